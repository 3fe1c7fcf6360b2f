"""The benchmark of a feedback step: options that are called exact are, and its figures add up."""

import json

import pytest
import torch

from benchmarks.common import clock_of
from benchmarks.feedback_report import PARTS, figures
from benchmarks.feedback_step import OPTIONS, main, run_bench

# Compiling takes a minute or more.
QUICK = [name for name in OPTIONS if "compiled" not in name]


def check(bench):
    """Checks that parts add up to steps, and that what is called exact is."""
    for timing in bench["timings"]:
        assert sum(timing["seconds"][part] for part in PARTS) == pytest.approx(timing["seconds"]["step"], rel=0.5)
        assert timing["above_needed"] > 0
        if timing["exact"]:
            assert timing["loss_error"] < 1e-5 and timing["gradient_error"] < 1e-5
        else:
            assert 1e-7 < timing["gradient_error"] < 0.5


@pytest.mark.slow
def test_the_command_times_every_option_against_the_plain_step(tmp_path, capsys):
    command = ["--config", "tiny", "--pairs", "2", "--device", "cpu", "--options", *QUICK]

    main([*command, "--json", str(tmp_path / "bench.json"), "--plot", str(tmp_path / "bench.png")])

    bench, text = json.loads((tmp_path / "bench.json").read_text()), capsys.readouterr().out
    run = [timing["name"] for timing in bench["timings"]]
    assert run[0] == "plain" and sorted(run[1:] + list(bench["skipped"])) == sorted(QUICK)
    check(bench)
    assert "| cached latents |" in text
    for name, reason in bench["skipped"].items():
        assert name in ("torchao_int8", "bnb_8bit", "bnb_4bit") and f"Not run: {name}. {reason}" in text
    assert (tmp_path / "bench.png").stat().st_size > 5000


@pytest.mark.slow
def test_compiling_is_exact():
    check(figures(run_bench("tiny", 2, "cpu", ["cached latents, compiled denoiser"])))


def test_one_thread_is_timed_by_what_it_computes(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert clock_of(torch.device("cpu"))[1] == "CPU seconds"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert clock_of(torch.device("cpu"))[1] == "wall time"


def test_unknown_names_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="no config 'huge'; choose from tiny, mid, paper"):
        run_bench("huge")
    with pytest.raises(ValueError, match="no option 'faster'; choose from cached latents, "):
        run_bench("tiny", options=["faster"])
