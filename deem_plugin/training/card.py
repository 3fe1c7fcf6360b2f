"""The model card of a run: where the weights come from, how they were trained, and under whose licence."""

import dataclasses
from enum import Enum
from pathlib import Path

import yaml

from deem_plugin import __version__
from deem_plugin.feedback.config import RossConfig
from deem_plugin.settings import changed_settings, default_of
from deem_plugin.training.recipes import Recipe

NAMED_LOSSES = ("loss", "lm_loss", "image_loss", "feedback_loss")
PAPER = "2405.15232"
# Key of the card's metadata, by which a later stage learns which diffusion models gave feedback to the earlier ones.
_DIFFUSION_MODELS = "feedback_diffusion_models"
# How to read with an interleaved model, whose class transformers does not have.
_USE = """```python
import deem_plugin.models  # makes the class known
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("THIS/MODEL")
processor = AutoProcessor.from_pretrained("THIS/MODEL")
```

It reads pictures without any diffusion model; to draw it is given one by `model.attach_diffusion_model`."""


def write_card(folder: str | Path, recipe: Recipe, log_history: list[dict]) -> Path:
    """
    Writes the `README.md` beside a trained model, as the hub shows it, and returns its path.

    Args:
        folder (`str` or `Path`): Folder of the model.
        recipe (`Recipe`): What was trained.
        log_history (`list[dict]`): The Trainer's log, whose first and last losses are told.
    """
    from huggingface_hub import ModelCard, ModelCardData

    source = recipe.model.model or recipe.model.language_model or recipe.model.encoder
    diffusion_models = _diffusion_models(recipe, source)
    data = ModelCardData(
        base_model=source,
        library_name="transformers",
        pipeline_tag="feature-extraction" if recipe.model.encoder else "image-text-to-text",
        tags=["deem-plugin", "diffusion-feedback", f"arxiv:{PAPER}"],
        **({_DIFFUSION_MODELS: diffusion_models} if diffusion_models else {}),
    )
    # Local folders are no names on the hub, which refuses cards that point at them.
    if Path(source).expanduser().exists() or source.count("/") != 1:
        data.base_model = None
    path = Path(folder) / "README.md"
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(recipe, source, diffusion_models, log_history)}").save(path)
    return path


def _diffusion_models(recipe: Recipe, source: str) -> dict[str, str]:
    """Returns the diffusion models that gave feedback, now or in an earlier stage, each with the line about it."""
    card = Path(source).expanduser() / "README.md"
    earlier = {}
    if card.is_file():
        from huggingface_hub import ModelCard

        earlier = ModelCard.load(card).data.to_dict().get(_DIFFUSION_MODELS, {})
    name, role = None, "The frozen diffusion model `{}` gave the feedback"
    if isinstance(recipe.feedback, RossConfig):
        name, role = recipe.feedback.autoencoder, "The frozen autoencoder of `{}` said what its words should restore"
    elif recipe.feedback is not None:
        name = recipe.feedback.diffusion_model.path
    elif recipe.deem is not None:
        name = recipe.deem.denoiser
    if name is None:
        return earlier
    return earlier | {name: f"{role.format(name)} and is not part of it. {_licence(name)}"}


def _text(recipe: Recipe, source: str, diffusion_models: dict[str, str], log_history: list[dict]) -> str:
    lines = [
        f"# {recipe.name}",
        "",
        f"Trained by [deem-plugin](https://pypi.org/project/deem-plugin/) {__version__}, which implements the "
        f"diffusion feedback of DEEM ([arXiv {PAPER}](https://arxiv.org/abs/{PAPER})), from `{source}`.",
        "",
    ]
    if recipe.model.vision_tower:
        weights = recipe.model.vision_pretrained or "as that name says"
        lines += [f"Vision tower: `{recipe.model.vision_tower}`, weights: {weights}.", ""]
    for line in diffusion_models.values():
        lines += [line, ""]
    lines += [
        f"Data: {_data(recipe.data)}. Its terms, and those of what the model started from, hold for it, too.",
        "",
    ]
    if recipe.deem is not None:
        lines += [_USE, ""]
    logged = [entry for entry in log_history if "loss" in entry]
    if logged:
        lines += ["| | first logged | last logged |", "|---|---|---|"]
        lines += [
            f"| {name} | {logged[0][name]:.4g} | {logged[-1][name]:.4g} |"
            for name in NAMED_LOSSES
            if name in logged[0] and name in logged[-1]
        ]
        command = "deem eval-encoder" if recipe.model.encoder else "deem eval"
        lines += ["", f"These are training losses. What it can do is measured by `{command}`.", ""]
    lines += ["## Recipe", "", "```yaml", yaml.safe_dump(_sections(recipe), sort_keys=False).rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _data(data) -> str:
    """Names what a recipe was trained on."""
    if data.kind == "shards":
        names = [shards for shards in (data.interleaved, data.pairs) if shards is not None]
    elif data.kind == "regions":
        names = [f"{source['format']}: {source['image_dir']}" for source in data.sources]
    else:
        names = [data.path]
    return ", ".join(f"`{name}`" for name in names)


def _licence(denoiser: str) -> str:
    """Returns what the diffusion model's own card says of its licence, where it lies in a local folder."""
    card = Path(denoiser).expanduser() / "README.md"
    if card.is_file():
        from huggingface_hub import ModelCard

        if licence := ModelCard.load(card).data.license:
            return f"Its licence: {licence}."
    return "Its licence is that of its own page (Stable Diffusion: CreativeML OpenRAIL-M)."


def _sections(recipe: Recipe) -> dict:
    """Returns the recipe's sections with the settings that differ from their defaults."""
    feedback = "ross" if isinstance(recipe.feedback, RossConfig) else "feedback"
    given = {"model": recipe.model, "data": recipe.data, feedback: recipe.feedback, "deem": recipe.deem}
    sections = {name: changed_settings(section) for name, section in given.items() if section is not None}
    arguments = recipe.training
    plain = (bool, int, float, str)
    sections["training"] = {
        item.name: value.value if isinstance(value, Enum) else value
        for item in dataclasses.fields(arguments)
        if isinstance(value := getattr(arguments, item.name), plain) and value != default_of(item) and item.init
    }
    # Where a run was written to says nothing about the model.
    for name in ("output_dir", "logging_dir", "run_name", "hub_token", "resume_from_checkpoint"):
        sections["training"].pop(name, None)
    return sections
