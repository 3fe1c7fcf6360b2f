"""Arms in processes: how far they are is read from their logs, and a failure is not lost."""

import json

import pytest

from deem_plugin.demo.arms import ARMS, CONTROL_ARMS
from deem_plugin.demo.run import main
from deem_plugin.demo.runner import child_environment, run_arms
from deem_plugin.evaluation.offline import cache_dir
from deem_plugin.evaluation.robustvqa import robustvqa_file, write_robustvqa

from ..evaluation.helpers import robustvqa_rows


def test_an_arm_finds_the_sets_of_the_demo_and_no_others(tmp_path, monkeypatch):
    """As the evaluation of an arm looks for them, whatever the user's own environment says."""
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", "elsewhere")
    monkeypatch.setenv("DEEM_HOME", "elsewhere")
    monkeypatch.setenv("DEEM_ROBUSTVQA", "elsewhere")
    written = write_robustvqa(robustvqa_rows(images=1), tmp_path / "sets" / "robustvqa" / "robustvqa_a.parquet")

    environment = child_environment(tmp_path)

    for name in ("LMMS_EVAL_DATASETS_CACHE", "DEEM_HOME", "DEEM_ROBUSTVQA"):
        monkeypatch.delenv(name) if environment.get(name) is None else monkeypatch.setenv(name, environment[name])
    assert robustvqa_file("a") == str(written)
    assert cache_dir() == tmp_path / "cache"


def test_failing_arm_is_reported_with_the_end_of_its_log(tmp_path):
    folder = tmp_path / "seed-0"
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps({"unknown": 1}))
    with pytest.raises(RuntimeError, match=r"(?s)seed-0 feedback failed \(exit code 1\).*unexpected keyword"):
        run_arms(tmp_path, [(folder, "feedback")])


def test_no_arm_is_called_like_another():
    assert not ARMS.keys() & CONTROL_ARMS.keys()
    assert len({arm.title for arm in (ARMS | CONTROL_ARMS).values()}) == 5


def test_number_of_seeds_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        main(tmp_path, seeds=0)


@pytest.mark.slow
@pytest.mark.parametrize("controls", [False, True])
def test_short_form_goes_through_everything(tmp_path, controls):
    assert main(tmp_path, controls=controls, fast=True) == 0
    report = (tmp_path / "report.md").read_text()
    assert "Short form" in report
    for arm in (ARMS | CONTROL_ARMS if controls else ARMS).values():
        assert arm.title in report
    for picture in ("losses.png", "scores.png", "reconstructions.png"):
        assert (tmp_path / picture).stat().st_size > 5000
    assert "(seed-0/compare/compare.html)" in report
    assert "deem_details" in (tmp_path / "seed-0/compare/compare.html").read_text()
