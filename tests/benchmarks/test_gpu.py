"""The script for a GPU, in small on a CPU: every part runs, and what fails is named and does not end the others."""

import json

import pytest

from benchmarks import gpu, gpu_step


@pytest.mark.slow
def test_every_part_runs_in_small(tmp_path, capsys):
    gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)])

    report, page = json.loads((tmp_path / "gpu.json").read_text()), capsys.readouterr().out
    assert set(report["failed"]) <= {"torchao_int8", "bnb_8bit", "bnb_4bit"}
    assert report["equality"] and all(row["within"] for row in report["equality"])
    assert set(report["step"]) == set(gpu_step.VARIANTS) and report["answers"]["timings"]
    assert report["step"]["without feedback"]["planned_bytes"] < report["step"]["with feedback"]["planned_bytes"]
    assert (tmp_path / "gpu.md").read_text() in page and "| both |" in page


def test_a_part_that_fails_is_named_and_the_others_go_on(monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu.feedback_step, "run_bench", fails)
    monkeypatch.setattr(gpu.gpu_step, "save_parts", lambda *arguments: None)
    monkeypatch.setattr(gpu.gpu_step, "time_step", lambda *arguments: {"seconds": 1.0, "loss": 2.0})
    monkeypatch.setattr(gpu.gpu_step, "planned_bytes", lambda *arguments: 2**30)
    monkeypatch.setattr(gpu.answers, "run_eval_bench", fails)

    report = gpu.run("cpu", tiny=True)

    assert report.failed == dict.fromkeys(("equality", "answers"), "RuntimeError: no such kernel")
    assert set(report.step) == set(gpu_step.VARIANTS)
    assert "- answers: RuntimeError: no such kernel" in gpu.page(report)


def test_no_part_begins_when_the_time_is_over(monkeypatch):
    monkeypatch.setattr(gpu, "BUDGET", -1)

    report = gpu.run("cpu", tiny=True)

    assert len(report.failed) == 3 + len(gpu_step.VARIANTS) and not report.step
