"""Runs the demo: makes start and data, trains and evaluates every arm, and writes the report."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

from .arms import ARMS, CONTROL_ARMS, SETTINGS_FILE, START, Settings

TRAIN_SCENES, TEST_SCENES, PROBE_SCENES = 3000, 330, 1600
FAST_TRAIN_SCENES, FAST_TEST_SCENES, FAST_PROBE_SCENES = 120, 6, 60
FAST_STEPS = (4, 4)


def main(
    out_dir: str | Path, seeds: int = 1, controls: bool = False, fast: bool = False, methods: bool = False
) -> int:
    """
    Trains a small vision-language model with and without diffusion feedback, and compares the two.

    Writes `report.md` and pictures to `out_dir`, beside everything that was made on the way.

    Args:
        out_dir (`str` or `Path`): Folder to write; what an earlier demo left in it is replaced.
        seeds (`int`): Trainings of each arm, with different data and weights.
        controls (`bool`): Whether the control arms are trained, too.
        fast (`bool`): Whether a few steps on little data must do, to see that everything runs.
        methods (`bool`): Whether the shipped recipes of several methods are compared instead, in `methods.md`.

    Returns:
        `int`: Exit status.

    Raises:
        ValueError: If `seeds` is not positive.
        RuntimeError: If an arm fails.
    """
    if seeds < 1:
        raise ValueError(f"`seeds` is the number of trainings of each arm and must be at least 1, got {seeds}.")
    from .methods_report import METHODS_ARMS, write_methods_report
    from .report import BASELINE, MAIN_ARM, write_report
    from .runner import compare_arms, run_arms

    out = Path(out_dir).absolute()
    arms = METHODS_ARMS if methods else ARMS | CONTROL_ARMS if controls else ARMS
    folders = [out / f"seed-{seed}" for seed in range(seeds)]
    prepare(out, folders, fast)
    jobs = [(folder, name) for folder in folders for name in arms]
    run_arms(out, [*jobs, (folders[0], START)])
    if methods:
        report = write_methods_report(out, folders, fast)
    else:
        for folder in folders:
            compare_arms(out, folder, BASELINE, MAIN_ARM)
        report = write_report(out, folders, arms, fast)
    sys.stdout.write(f"Report: {report}\n")
    return 0


def prepare(out: Path, folders: list[Path], fast: bool):
    """Writes the test sets and, for each seed, its settings, its training set and the start of its arms."""
    from .models import PRETRAINING_STEPS, save_start
    from .sets import training_scenes, write_test_sets, write_training_set

    for stale in (*out.glob("seed-*"), out / "cache", out / "sets"):
        shutil.rmtree(stale, ignore_errors=True)
    write_test_sets(out / "sets", out / "cache", FAST_TEST_SCENES if fast else TEST_SCENES)
    for seed, folder in enumerate(folders):
        scenes, pictures = training_scenes(FAST_TRAIN_SCENES if fast else TRAIN_SCENES, seed)
        write_training_set(folder / "data", scenes, pictures, seed)
        save_start(folder / START, scenes, pictures, seed, 2 if fast else PRETRAINING_STEPS)
        settings = Settings(
            seed=seed,
            steps=FAST_STEPS if fast else None,
            probe_count=FAST_PROBE_SCENES if fast else PROBE_SCENES,
            fast=fast,
        )
        (folder / SETTINGS_FILE).write_text(json.dumps(dataclasses.asdict(settings)), encoding="utf-8")
