"""
The demo's arms: one training each, in a process of its own, from the same start on the same data in the same order.

`python -m deem_plugin.demo.arms FOLDER ARM` runs one arm in a seed's folder.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

START = "start"
STAGES = ("tiny-align", "tiny-tune")
TASKS = ("robustvqa", "pope", "deem_details")
SETTINGS_FILE = "settings.json"
RESULTS_FOLDER = "evaluation"
COMPARE_FOLDER = "compare"
TOKENS_FILE = "tokens.json"
RECONSTRUCTED_FILE = "reconstructed.safetensors"
# Precedes in an arm's log the name of what it does next.
PHASE = "deem demo: "


@dataclass(frozen=True)
class Arm:
    """
    One way to train.

    Args:
        title (`str`): How the report calls it.
        feedback (`bool`): Whether the recipes' feedback is on.
        control (`str`, *optional*): Key of `controls.CONTROLS`: what replaces the diffusion feedback.
        method (`str`, *optional*): Key of `methods.METHODS`: whose feedback it is; the demo's own without it.
        step_factor (`float`): Factor on the recipes' steps.
    """

    title: str
    feedback: bool = True
    control: str | None = None
    method: str | None = None
    step_factor: float = 1.0


ARMS = {
    "no-feedback": Arm("no feedback", feedback=False),
    "feedback": Arm("feedback"),
}
CONTROL_ARMS = {
    "longer": Arm("no feedback, 1.5x steps", feedback=False, step_factor=1.5),
    "another-image": Arm("feedback toward another image", control="another-image"),
    "pixel-decoder": Arm("pixel decoder, no diffusion", control="pixel-decoder"),
}
METHOD_ARMS = {
    name: Arm(title, method=name)
    for name, title in (
        ("deem", "DEEM"),
        ("diva", "DIVA"),
        ("dcr", "DCR"),
        ("genhancer", "GenHancer"),
        ("ross", "ROSS"),
    )
}
ALL_ARMS = ARMS | CONTROL_ARMS | METHOD_ARMS


@dataclass(frozen=True)
class Settings:
    """
    What the arms of one seed share; written to the seed's folder.

    Args:
        seed (`int`): Seed of the training.
        steps (`tuple[int, int]`, *optional*): Steps of the two stages; the recipes' own by default.
        probe_count (`int`): Scenes for the probes.
        fast (`bool`): Whether this is the short form.
    """

    seed: int
    steps: tuple[int, int] | None
    probe_count: int
    fast: bool


def train_arm(folder: Path, name: str, settings: Settings) -> Path:
    """Runs both recipes of an arm and returns the final checkpoint."""
    from deem_plugin.feedback.config import FeedbackConfig
    from deem_plugin.training.recipes import load_recipe
    from deem_plugin.training.run import train

    from .controls import CONTROLS
    from .diffusion_model import shipped_diffusion_model
    from .methods import method_overrides, train_first_stage

    arm = ALL_ARMS[name]
    checkpoint = start = folder / START
    chosen = [f"feedback.diffusion_model.path={shipped_diffusion_model()}"] if arm.feedback else ["feedback=null"]
    if arm.method is not None:
        _announce("first stage")
        chosen = method_overrides(arm.method, shipped_diffusion_model())
        chosen += train_first_stage(
            arm.method, folder / name, start, shipped_diffusion_model(), settings.seed, settings.fast
        )
    for index, (stage, data) in enumerate(zip(STAGES, ("captions.json", "questions.json"), strict=True)):
        overrides = [
            f"model.model={checkpoint}",
            f"data.path={folder / 'data' / data}",
            f"data.cache_dir={folder.parent / 'cache'}",
            f"training.output_dir={folder / name / stage}",
            f"training.seed={settings.seed}",
        ]
        recipe = load_recipe(stage, overrides + chosen)
        if index and isinstance(recipe.feedback, FeedbackConfig):
            recipe.feedback.conditioner = None  # the second stage goes on with that of the first
        steps = settings.steps[index] if settings.steps else recipe.training.max_steps
        if settings.fast:
            recipe.training.logging_steps = 1
        recipe.training.max_steps = round(steps * arm.step_factor)
        _announce(stage)
        checkpoint = train(recipe, CONTROLS[arm.control] if arm.control else None)
    return checkpoint


def _announce(phase: str):
    sys.stderr.write(f"{PHASE}{phase}\n")
    sys.stderr.flush()


def run_arm(folder: Path, name: str):
    """Trains an arm and evaluates it with lmms-eval, unless it is the start itself; then looks into its tokens."""
    # First, and before the heavy imports: a folder that is none fails at once.
    settings = Settings(**json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8")))
    from safetensors.torch import save_file

    from deem_plugin.evaluation.loading import load_vlm
    from deem_plugin.evaluation.run import evaluate
    from deem_plugin.feedback.diffusion_model import load_diffusion_model

    from .diffusion_model import load_code, shipped_diffusion_model
    from .models import load_names
    from .probes import look_into, zero_shot
    from .sets import probe_scenes

    checkpoint = folder / START
    if name != START:
        checkpoint = train_arm(folder, name, settings)
        _announce("lmms-eval")
        arguments = [
            "--tasks",
            ",".join(TASKS),
            "--output_path",
            str(folder / name / RESULTS_FOLDER),
            "--batch_size",
            "64",
        ]
        evaluate(checkpoint, [*arguments, "--model_args", "device=cpu"])
    _announce("tokens")
    model, processor = load_vlm(str(checkpoint), "auto", "cpu")
    scenes, pictures = probe_scenes(settings.probe_count)
    diffusion_model, code = load_diffusion_model(str(shipped_diffusion_model())), load_code(shipped_diffusion_model())
    report = look_into(model, processor, diffusion_model, code, scenes, pictures)
    save_file({"reconstructed": report.reconstructions}, folder / name / RECONSTRUCTED_FILE)
    names = load_names(folder / START, model.model.vision_tower.config.encoder_dim)
    tokens = {
        "probes": report.probes,
        "denoising_error": report.denoising_error,
        "zero_shot": zero_shot(model, processor, names, scenes, pictures),
    }
    (folder / name / TOKENS_FILE).write_text(json.dumps(tokens), encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Runs the arm `arguments[1]` in the seed's folder `arguments[0]`."""
    folder, name = arguments
    run_arm(Path(folder), name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
