"""
Trainings of the demo with other settings of its feedback, for `experiments.share` and `experiments.balance`.

What was run is kept, one file a run, so that a study goes on where it was stopped. `python -m experiments.demo_runs
OUT RUN` trains and evaluates one run in a process of its own, with the demo's environment.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

from deem_plugin.demo.arms import STAGES, START
from deem_plugin.demo.run import TEST_SCENES, TRAIN_SCENES
from deem_plugin.demo.runner import child_environment
from deem_plugin.feedback.diffusion_feedback import DiffusionFeedback

TASK = "deem_details"


@dataclass(frozen=True)
class Run:
    """
    One training of the demo.

    Args:
        seed (`int`): Of model, data and training.
        weight (`float`): Of the feedback; 0 is none.
        share (`float`), balance (`float`, *optional*): As in [`FeedbackConfig`].
        learning_rate (`float`, *optional*): The recipe's own by default.
        loss_scale (`float`): Factor on the feedback's loss, as another denoiser would bring it.
        steps (`tuple[int, int]`, *optional*): Of the two stages; the recipes' own by default.
    """

    seed: int = 0
    weight: float = 5.0
    share: float = 1.0
    balance: float | None = None
    learning_rate: float | None = None
    loss_scale: float = 1.0
    steps: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """A name for its folder: what differs from the defaults."""
        given = {key: value for key, value in asdict(self).items() if value != getattr(type(self), key)}
        given |= {"seed": self.seed, **({"steps": "-".join(map(str, self.steps))} if self.steps else {})}
        # lmms-eval takes no comma and no equals sign in the path of a checkpoint.
        return "_".join(f"{name}-{value}" for name, value in given.items())


def scaled(factor: float):
    """Returns a maker of the recipe's objective with a loss so many times as large."""

    class ScaledFeedback(DiffusionFeedback):
        def __call__(self, *args, **options):
            return factor * super().__call__(*args, **options)

    return ScaledFeedback


def prepare(out: Path, seeds: Sequence[int]):
    """Writes, once, the test sets and each seed's training set and start, as the demo makes them."""
    from deem_plugin.demo.models import PRETRAINING_STEPS, save_start
    from deem_plugin.demo.sets import training_scenes, write_test_sets, write_training_set

    if not (out / "sets.done").is_file():
        write_test_sets(out / "sets", out / "cache", TEST_SCENES)
        (out / "sets.done").touch()
    for seed in seeds:
        folder = out / f"seed-{seed}"
        if (folder / "done").is_file():
            continue
        scenes, pictures = training_scenes(TRAIN_SCENES, seed)
        write_training_set(folder / "data", scenes, pictures, seed)
        save_start(folder / START, scenes, pictures, seed, PRETRAINING_STEPS)
        (folder / "done").touch()


def train_and_evaluate(out: Path, run: Run) -> dict:
    """Runs both stages and lmms-eval's task of details; returns its score and the weights that were logged."""
    from deem_plugin.demo.diffusion_model import shipped_diffusion_model
    from deem_plugin.evaluation.run import evaluate
    from deem_plugin.training.recipes import load_recipe
    from deem_plugin.training.run import train

    folder, data = out / run.name, out / f"seed-{run.seed}"
    checkpoint, logs = data / START, []
    settings = [f"feedback.diffusion_model.path={shipped_diffusion_model()}", f"feedback.weight={run.weight}"]
    settings += [f"feedback.share={run.share}"]
    settings += [] if run.balance is None else [f"feedback.balance={run.balance}"]
    for index, (stage, file) in enumerate(zip(STAGES, ("captions.json", "questions.json"), strict=True)):
        overrides = [f"model.model={checkpoint}", f"data.path={data / 'data' / file}", f"training.seed={run.seed}"]
        overrides += [f"data.cache_dir={out / 'cache'}", f"training.output_dir={folder / stage}"]
        overrides += settings if run.weight else ["feedback=null"]
        if run.learning_rate is not None:
            overrides.append(f"training.learning_rate={run.learning_rate}")
        if run.steps is not None:
            overrides.append(f"training.max_steps={run.steps[index]}")
        checkpoint = train(load_recipe(stage, overrides), scaled(run.loss_scale) if run.loss_scale != 1 else None)
        state = json.loads((folder / stage / "trainer_state.json").read_text(encoding="utf-8"))
        logs.append(state["log_history"])
    arguments = ["--tasks", TASK, "--output_path", str(folder / "evaluation"), "--batch_size", "64"]
    results = evaluate(checkpoint, [*arguments, "--model_args", "device=cpu"])
    return {"run": asdict(run), "details": results["results"][TASK][f"{TASK}_accuracy,none"], "logs": logs}


def details_of(out: Path, runs: Sequence[Run]) -> dict[Run, dict]:
    """Returns what [`train_and_evaluate`] gave for each run; those that `out` does not hold yet are run."""
    prepare(out, sorted({run.seed for run in runs}))
    found = {}
    for number, run in enumerate(runs, start=1):
        file = out / f"{run.name}.json"
        if not file.is_file():
            sys.stderr.write(f"run {number} of {len(runs)}: {run.name}\n")
            command = [sys.executable, "-m", "experiments.demo_runs", str(out), json.dumps(asdict(run))]
            with (out / f"{run.name}.log").open("wb") as log:
                subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=child_environment(out), check=True)
        found[run] = json.loads(file.read_text(encoding="utf-8"))
    return found


def summary(scores: Sequence[float]) -> str:
    """Returns the mean of scores with the standard error in parentheses, where there are several."""
    spread = "" if len(scores) < 2 else f" ({stdev(scores) / len(scores) ** 0.5:.3f})"
    return f"{mean(scores):.3f}{spread}".replace("0.", ".")


def main(arguments: Sequence[str]):
    """Runs what [`details_of`] asks for."""
    out, given = Path(arguments[0]), json.loads(arguments[1])
    given["steps"] = tuple(given["steps"]) if given["steps"] else None
    run = Run(**given)
    result = train_and_evaluate(out, run)
    partial = out / f"{run.name}.json.partial"
    partial.write_text(json.dumps(result), encoding="utf-8")
    partial.rename(out / f"{run.name}.json")


if __name__ == "__main__":
    main(sys.argv[1:])
