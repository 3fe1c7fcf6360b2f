"""Writes the demo's report: what lmms-eval says of each arm, what is in the tokens, and what holds."""

import json
from pathlib import Path

from .arms import COMPARE_FOLDER, RESULTS_FOLDER, SETTINGS_FILE, STAGES, START, TASKS, TOKENS_FILE, Arm
from .figures import draw_losses, draw_reconstructions, draw_scores
from .scores import HEADLINES, Metric, read_metrics
from .tables import cell, difference_cell, mean, table

MAIN_ARM, BASELINE = "feedback", "no-feedback"

TITLE = "# A small vision-language model with and without diffusion feedback"
FAST = "**Short form: a few steps on little data, to see that everything runs. The scores mean nothing.**"
INTRODUCTION = """\
Stage 1 aligns on captions ("a red square"), stage 2 tunes on yes/no questions. Every arm starts from the same model
and sees the same data in the same order. The feedback comes from a frozen diffusion model that tries to restore each
picture from the visual tokens. Seeds: {seeds}. All scores are lmms-eval's, on held-out scenes:

* **details**: where the object is, how big, and on what background, which no caption named;
* **POPE**: is there an object that is not there, on scenes without the correlations of the training;
* **RobustVQA**: the main object where colour and background point to another one (A), in other renditions (R), and in
  scenes like those of the training (V2).
"""
LEGEND_ONE_SEED = """\
Accuracies; chance is 0.5 (0.25 for pairs). In brackets the 95 % interval of a bootstrap over images. It holds the
chance of the test pictures, not that of the training, which `--seeds 3` shows."""
LEGEND_SEEDS = """\
Accuracies, mean over seeds; chance is 0.5 (0.25 for pairs). In parentheses the standard error over seeds; that of
differences is of the differences within a seed. The test pictures are the same for all seeds."""
TOKENS = """\
Linear probes on frozen tokens of held-out scenes: accuracy for shape (chance 0.13) and background texture (0.25), R2
for position and size. *Before* is the tower that the arms of seed 0 start from. *Denoising error* is that of the
diffusion model when its condition is read from the tokens by one more linear probe: the lower, the more of the picture
is in the tokens. *Zero-shot shape* is what the encoder retains of its pretraining: how often the vector that it
learned for
a shape's name then still fits best. The pictures are what it then expects to see before it is shown anything."""
COMMANDS = """\
The arm with feedback by hand; the other one has `feedback=null` in place of the diffusion model:

```
deem train tiny-align model.model={seed}/start data.path={seed}/data/captions.json \\
    training.output_dir=align feedback.diffusion_model.path=DIFFUSION_MODEL
deem train tiny-tune model.model=align/final data.path={seed}/data/questions.json \\
    training.output_dir=tune feedback.diffusion_model.path=DIFFUSION_MODEL
export DEEM_HOME={out}/sets LMMS_EVAL_DATASETS_CACHE={out}/cache HF_HUB_OFFLINE=1
lmms-eval --model deem --model_args pretrained=tune/final --tasks {tasks} --batch_size 64
```

DIFFUSION_MODEL is `deem_plugin/demo/pretrained_diffusion_model` of the installed package."""


def write_report(out: Path, folders: list[Path], arms: dict[str, Arm], fast: bool) -> Path:
    """
    Writes `report.md` and its pictures.

    Args:
        out (`Path`): The demo's folder.
        folders (`list[Path]`): The seeds' folders.
        arms (`dict[str, Arm]`): The arms that were run.
        fast (`bool`): Whether it was the short form, whose scores mean nothing.
    """
    metrics = [{name: read_metrics(folder / name / RESULTS_FOLDER) for name in arms} for folder in folders]
    tokens = [{name: _read(folder / name / TOKENS_FILE) for name in arms} for folder in folders]
    start = _read(folders[0] / START / TOKENS_FILE)
    draw_losses(out / "losses.png", folders[0], arms)
    draw_scores(out / "scores.png", metrics, arms)
    draw_reconstructions(
        out / "reconstructions.png", folders[0], arms, _read(folders[0] / SETTINGS_FILE)["probe_count"]
    )

    parts = [
        TITLE,
        *([FAST] if fast else []),
        INTRODUCTION.format(seeds=len(folders)).rstrip(),
        "## Scores",
        _scores_table(metrics, arms),
        LEGEND_ONE_SEED if len(folders) == 1 else LEGEND_SEEDS,
        "![scores](scores.png)",
        "## What holds",
        _verdicts(metrics, arms),
        _comparisons(out, folders),
        "## What is in the tokens",
        _tokens_table(tokens, start, arms),
        TOKENS,
        "![reconstructions](reconstructions.png)",
        "## Training",
        "![losses](losses.png)",
        _times_table(folders, arms),
        COMMANDS.format(seed=folders[0], out=out, tasks=",".join(TASKS)),
    ]
    report = out / "report.md"
    report.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return report


def _comparisons(out: Path, folders: list[Path]) -> str:
    pages = [f"[{folder.name}]({(folder / COMPARE_FOLDER / 'compare.html').relative_to(out)})" for folder in folders]
    return f"Every answer that differs between without and with feedback, beside its picture: {', '.join(pages)}."


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _scores_table(metrics: list[dict[str, dict[str, Metric]]], arms: dict[str, Arm]) -> str:
    header = ["score", *(arm.title for arm in arms.values()), "feedback - no feedback"]
    rows = []
    for metric in metrics[0][BASELINE]:
        by_arm = {name: [seed[name][metric] for seed in metrics] for name in arms}
        title = f"**{metric}**" if metric in HEADLINES else metric
        cells = [cell(by_arm[name]) for name in arms]
        rows.append([title, *cells, difference_cell(by_arm[MAIN_ARM], by_arm[BASELINE])])
    return table(header, rows)


def _verdicts(metrics: list[dict[str, dict[str, Metric]]], arms: dict[str, Arm]) -> str:
    """Compares the feedback with every other arm, seed by seed, whichever way it comes out."""
    rows = []
    for metric in HEADLINES:
        for name, arm in arms.items():
            if name == MAIN_ARM:
                continue
            ours, others = ([seed[key][metric] for seed in metrics] for key in (MAIN_ARM, name))
            differences = [a.value - b.value for a, b in zip(ours, others, strict=True)]
            wins = sum(difference > 0 for difference in differences)
            holds = f"{wins} of {len(differences)} seeds" if len(differences) > 1 else ("yes" if wins else "no")
            by_seed = ", ".join(f"{difference:+.3f}" for difference in differences)
            rows.append([metric, f"feedback - {arm.title}", difference_cell(ours, others), by_seed, holds])
    return table(["score", "comparison", "difference", "by seed", "feedback ahead on"], rows)


def _tokens_table(tokens: list[dict[str, dict]], start: dict, arms: dict[str, Arm]) -> str:
    rows = []
    for probe in start["probes"]:
        means = [f"{mean([seed[name]['probes'][probe] for seed in tokens]):.3f}" for name in arms]
        rows.append([f"probe: {probe}", f"{start['probes'][probe]:.3f}", *means])
    errors = [f"{mean([seed[name]['denoising_error'] for seed in tokens]):.4f}" for name in arms]
    rows.append(["denoising error", f"{start['denoising_error']:.4f}", *errors])
    kept = [f"{mean([seed[name]['zero_shot'] for seed in tokens]):.3f}" for name in arms]
    rows.append(["zero-shot shape", f"{start['zero_shot']:.3f}", *kept])
    return table(["", "before", *(arm.title for arm in arms.values())], rows)


def _times_table(folders: list[Path], arms: dict[str, Arm]) -> str:
    rows = []
    for name, arm in arms.items():
        logs = [[_read(folder / name / stage / "trainer_state.json") for stage in STAGES] for folder in folders]
        steps = sum(state["global_step"] for state in logs[0])
        seconds = [sum(state["log_history"][-1]["train_runtime"] for state in states) for states in logs]
        rows.append([arm.title, str(steps), f"{mean(seconds):.0f} s"])
    return table(["arm", "steps", "training time (two arms side by side)"], rows)
