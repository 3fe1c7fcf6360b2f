"""Arms in processes: how far they are is read from their logs, and a failure is not lost."""

import json

import pytest

from deem_plugin.demo.arms import ARMS, CONTROL_ARMS
from deem_plugin.demo.run import main
from deem_plugin.demo.runner import child_environment, run_arms


def test_arms_get_one_thread_and_caches_of_the_demo(tmp_path):
    environment = child_environment(tmp_path)
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["LMMS_EVAL_DATASETS_CACHE"] == str(tmp_path / "cache")
    assert environment["DEEM_HOME"] == str(tmp_path / "sets")


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
