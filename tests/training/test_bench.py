"""The benchmark of a feedback step: options that are called exact are, and its figures add up."""

import json

import pytest

from deem_plugin.cli import main
from deem_plugin.training.bench import OPTIONS, PARTS, make_setting


def test_the_command_times_every_option_against_the_plain_step(tmp_path, capsys):
    files = ["--json", str(tmp_path / "bench.json"), "--plot", str(tmp_path / "bench.png")]

    assert main(["bench", "feedback", "--config", "tiny", "--pairs", "2", "--device", "cpu", *files]) == 0

    bench = json.loads((tmp_path / "bench.json").read_text())
    assert [timing["name"] for timing in bench["timings"]] == list(OPTIONS)
    for timing in bench["timings"]:
        assert sum(timing["seconds"][part] for part in PARTS) == pytest.approx(timing["seconds"]["step"], rel=0.5)
        if timing["exact"]:
            assert timing["loss_error"] < 1e-5 and timing["gradient_error"] < 1e-5
    assert 0 < bench["denoiser_share"] < 1
    assert "| cached latents |" in capsys.readouterr().out
    assert (tmp_path / "bench.png").stat().st_size > 5000


def test_an_unknown_config_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="no config 'huge'; choose one of tiny, mid, paper"):
        make_setting("huge", "cpu")
