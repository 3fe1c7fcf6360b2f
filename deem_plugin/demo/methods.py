"""The shipped recipes of several feedback methods at the demo's scale, so that they can be compared on one budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .models import TOWER_FOLDER

# What a recipe's feedback says of its method; the rest is about sizes, places and precision.
METHOD_KEYS = (
    "condition.kind",
    "objective.kind",
    "objective.draws_per_image",
    "objective.timestep_sampling",
    "objective.loss_weighting",
    "anchor_weight",
)
# Factor on the feedback of every method, the demo's own.
WEIGHT = 5.0
# Steps that a conditioner, or a diffusion model of its own, gets on the frozen tower before the arm starts.
FIRST_STAGE_STEPS = 500


@dataclass(frozen=True)
class Method:
    """
    A feedback method in the demo.

    Args:
        recipe (`str`): The shipped recipe.
        first_stage (`str`, *optional*): The shipped recipe that comes before it, on images alone.
        settings (`tuple[str, ...]`): What the demo's size asks for beyond the recipe, as overrides.
    """

    recipe: str
    first_stage: str | None = None
    settings: tuple[str, ...] = ()


METHODS = {
    "deem": Method("deem"),
    # With the pooled vector as many tokens as the diffusion model knows. It has no text encoder that a prompt could
    # ask.
    "diva": Method("diva", settings=("feedback.condition.num_patches=7",)),
    # All 47 other pictures of a batch would cost 49 runs of the diffusion model each; these are 5.
    "dcr": Method("dcr", "dcr-align", ("feedback.objective.num_negatives=3",)),
    "genhancer": Method("genhancer", "tiny-denoiser"),
    # The tower's eight queries have no places of their own: each is given 8 x 8 pixels, in two rows of four.
    "ross": Method(
        "ross",
        settings=("ross.token_cells=8", "ross.width=96", "ross.layers=3", "ross.heads=3", f"ross.weight={WEIGHT}"),
    ),
}


def method_overrides(name: str, diffusion_model: Path) -> list[str]:
    """
    Returns overrides that put a method's feedback in place of the demo's own.

    Args:
        name (`str`): The method.
        diffusion_model (`Path`): The demo's; of ROSS its autoencoder alone is read.
    """
    from deem_plugin.training.recipes import read_sections

    method = METHODS[name]
    sections = read_sections(method.recipe)
    section = "feedback" if sections.get("feedback") is not None else "ross"
    chosen = {key: value for key in METHOD_KEYS if (value := _at(sections[section], key)) is not None}
    model = "diffusion_model.path" if section == "feedback" else "autoencoder"
    overrides = [] if section == "feedback" else ["feedback=null"]
    overrides += [f"{section}.{model}={diffusion_model}"]
    return [*overrides, *(f"{section}.{key}={value}" for key, value in chosen.items()), *method.settings]


def _at(settings: dict, key: str):
    """Returns the setting of a dotted key; None where there is none."""
    head, dot, rest = key.partition(".")
    value = settings.get(head)
    return value if not dot or value is None else _at(value, rest)


def train_first_stage(
    name: str, folder: Path, start: Path, diffusion_model: Path, seed: int, fast: bool
) -> Sequence[str]:
    """
    Runs a method's stage on images alone, if it has one.

    Args:
        name (`str`): The method.
        folder (`Path`): The arm's folder.
        start (`Path`): The model that all arms start from, with its tower beside it.
        diffusion_model (`Path`): The diffusion model that the other arms use.
        seed (`int`): Of the training.
        fast (`bool`): Whether a few steps must do.

    Returns:
        `Sequence[str]`: Overrides for the stages that follow.
    """
    method = METHODS[name]
    if method.first_stage is None:
        return []
    overrides = [
        f"model.encoder={start / TOWER_FOLDER}",
        f"data.path={folder.parent / 'data' / 'images'}",
        f"data.cache_dir={folder.parent.parent / 'cache'}",
        f"training.output_dir={folder / method.first_stage}",
        f"training.max_steps={4 if fast else FIRST_STAGE_STEPS}",
        f"training.seed={seed}",
        "training.learning_rate=1e-3",
        "training.per_device_train_batch_size=48",
        "training.gradient_accumulation_steps=1",
        "training.dataloader_num_workers=0",
        "training.save_strategy='no'",
        "training.use_cpu=true",
        "training.bf16=false",
        "training.tf32=null",
        "training.report_to=none",
    ]
    if method.first_stage == "tiny-denoiser":
        from deem_plugin.training.denoiser import train_denoiser
        from deem_plugin.training.recipes import load_recipe

        final = train_denoiser(load_recipe(method.first_stage, overrides))
        return [f"feedback.diffusion_model.path={final}", f"feedback.conditioner={final}"]
    from deem_plugin.training.recipes import load_recipe
    from deem_plugin.training.run import train

    model = {"path": diffusion_model, "dtype": "float32", "image_size": "null"}
    overrides += [f"feedback.diffusion_model.{key}={value}" for key, value in model.items()]
    overrides += ["feedback.condition.prompt=null"]
    return [f"feedback.conditioner={train(load_recipe(method.first_stage, overrides))}"]
