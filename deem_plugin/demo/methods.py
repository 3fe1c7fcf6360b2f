"""The shipped recipes of several feedback methods at the demo's scale, so that they can be compared on one budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .models import TOWER_FOLDER

# What a recipe's section `feedback` says of its method; the rest is about sizes, places and precision.
METHOD_KEYS = (
    "source",
    "condition",
    "objective",
    "draws_per_image",
    "timestep_sampling",
    "loss_weighting",
    "anchor_weight",
    "official_defects",
)
# Steps that a conditioner, or a generator of its own, gets on the frozen tower before the arm starts.
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
    # With the pooled vector as many tokens as the generator knows. It has no text encoder that a prompt could ask.
    "diva": Method("diva", settings=("feedback.num_patches=7",)),
    # All 47 other pictures of a batch would cost 49 runs of the generator each; these are 5.
    "dcr": Method("dcr", "dcr-align", ("feedback.num_negatives=3",)),
    "genhancer": Method("genhancer", "tiny-generator"),
    # The tower's eight queries have no places of their own: each is given 8 x 8 pixels, in two rows of four.
    "ross": Method(
        "ross",
        settings=(
            "feedback.token_cells=8",
            "feedback.resampler_dim=96",
            "feedback.resampler_layers=3",
            "feedback.resampler_heads=3",
        ),
    ),
}


def method_overrides(name: str) -> list[str]:
    """Returns overrides that put a method's feedback in place of the demo's own."""
    from deem_plugin.training.recipes import read_sections

    method = METHODS[name]
    feedback = read_sections(method.recipe)["feedback"]
    chosen = {key: feedback[key] for key in METHOD_KEYS if key in feedback}
    return [f"feedback.{key}={value}" for key, value in chosen.items()] + list(method.settings)


def train_first_stage(name: str, folder: Path, start: Path, generator: Path, seed: int, fast: bool) -> Sequence[str]:
    """
    Runs a method's stage on images alone, if it has one.

    Args:
        name (`str`): The method.
        folder (`Path`): The arm's folder.
        start (`Path`): The model that all arms start from, with its tower beside it.
        generator (`Path`): The generator that the other arms use.
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
    if method.first_stage == "tiny-generator":
        from deem_plugin.training.denoiser import train_denoiser
        from deem_plugin.training.recipes import load_recipe

        final = train_denoiser(load_recipe(method.first_stage, overrides))
        return [f"feedback.denoiser={final}", f"feedback.conditioner={final}"]
    from deem_plugin.training.recipes import load_recipe
    from deem_plugin.training.run import train

    overrides += [f"feedback.denoiser={generator}", "feedback.dtype=float32", "feedback.prompt=null"]
    overrides += ["feedback.image_size=null"]
    return [f"feedback.conditioner={train(load_recipe(method.first_stage, overrides))}"]
