"""build_vision_tower: a vision tower by name."""

import contextlib
import difflib
from pathlib import Path

import open_clip
from transformers import AutoConfig, AutoModel, CLIPImageProcessor, PreTrainedConfig

from ..files import naming_the_checkpoint
from ..hub import at_revision, split_revision
from .configuration import DeemVisionConfig
from .tower import DeemVisionTower

# The encoder of the paper (https://arxiv.org/abs/2405.15232, Sec. 3.1).
DEEM_ENCODER = "convnext_base_w_320"
DEEM_QUERIES = 77


def build_vision_tower(
    name: str = "deem",
    *,
    pretrained: str | bool | None = None,
    image_size: int | None = None,
    num_queries: int | None = None,
    multiscale: bool = False,
    region_tokens: bool = False,
) -> DeemVisionTower:
    """
    Builds a vision tower by name, in training mode, float32, on the CPU.

    `"deem"` is the paper's: open_clip's convnext_base_w_320, adapters to 1024, and 77 queries in 12 layers of width
    768. `"deem:<encoder>"` is another encoder, which is one of: a model name of open_clip; the hub id or folder of a
    model of transformers that returns tokens or a map for a picture, or has such a vision part; the folder of a saved
    [`DeemVisionTower`], taken as it is.

    Args:
        name (`str`, *optional*, defaults to `"deem"`): See above. Only a hub id, or an open_clip tag in `pretrained`,
            may download anything.
        pretrained (`str` or `bool`, *optional*): For open_clip models: a tag of open_clip or a checkpoint file;
            without one the encoder's weights are new. For folders and hub ids: their weights are loaded unless this is
            `False`. Weights that are missing or left over are an error in every case. Adapters and resampler are new
            except in a saved tower.
        image_size (`int`, *optional*): Side of the input in pixels, if not the encoder's own.
        num_queries (`int`, *optional*): Number of queries of the resampler. 0 leaves it out: the VLM then reads the
            grid of patches. By default 77 for `"deem"` and 0 for `"deem:<encoder>"`.
        multiscale, region_tokens (`bool`, *optional*): As in [`DeemVisionConfig`]; for the interleaved model.

    Raises:
        `ValueError`: For a name that means nothing, with similar names, and for options that do not fit the encoder.
    """
    kind, _, encoder = name.partition(":")
    if kind != "deem" or (":" in name and not encoder):
        raise ValueError(f"A vision tower is called 'deem' or 'deem:<encoder>', got {name!r}.")
    if num_queries is None:
        num_queries = 0 if encoder else DEEM_QUERIES
    encoder = encoder or DEEM_ENCODER
    options = {"num_queries": num_queries, "multiscale": multiscale, "region_tokens": region_tokens}
    if encoder in open_clip.list_models():
        return _from_open_clip(encoder, pretrained, image_size, options)
    if Path(encoder).is_dir() or split_revision(encoder)[0].count("/") == 1:
        return _from_hugging_face(encoder, pretrained, image_size, options)
    similar = difflib.get_close_matches(encoder, open_clip.list_models(), n=5, cutoff=0.4)
    raise ValueError(
        f"Unknown encoder {encoder!r}: neither a model of open_clip, nor a folder, nor a hub id such as "
        f"'openai/clip-vit-large-patch14-336'. Similar names in open_clip: {', '.join(similar) or 'none'}."
    )


def _from_open_clip(encoder, pretrained, image_size, options) -> DeemVisionTower:
    model_config = open_clip.get_model_config(encoder)
    vision_cfg = {k: v for k, v in model_config["vision_cfg"].items() if k != "timm_model_pretrained"}
    if image_size is not None:
        vision_cfg["image_size"] = image_size
    tag = open_clip.get_pretrained_cfg(encoder, pretrained) if isinstance(pretrained, str) else {}
    if pretrained is True or (pretrained and not tag and not Path(pretrained).is_file()):
        raise ValueError(
            f"`pretrained` of {encoder} must be a file or a tag of open_clip, got {pretrained!r}. "
            f"Tags: {', '.join(open_clip.list_pretrained_tags_by_model(encoder)) or 'none'}."
        )
    quick_gelu = bool(tag.get("quick_gelu") or model_config.get("quick_gelu"))
    if quick_gelu:
        vision_cfg["quick_gelu"] = True
    if not pretrained:
        return DeemVisionTower(DeemVisionConfig(open_clip_config=vision_cfg, **options))

    # The whole model, text tower included: open_clip knows how to read each of its checkpoints, strictly, and resizes
    # position embeddings.
    model = open_clip.create_model(
        encoder, pretrained=pretrained, force_quick_gelu=quick_gelu, force_image_size=image_size, pretrained_text=False
    )
    preprocessing = open_clip.get_model_preprocess_cfg(model)
    config = DeemVisionConfig(
        open_clip_config=vision_cfg,
        image_mean=list(preprocessing["mean"]),
        image_std=list(preprocessing["std"]),
        **options,
    )
    tower = DeemVisionTower(config)
    # The projection to the contrastive space is left behind, it has no use here.
    weights = {
        name.removeprefix("trunk."): value
        for name, value in model.visual.state_dict().items()
        if name != "proj" and not name.startswith("head.")
    }
    tower.encoder.trunk.load_state_dict(weights, strict=True)
    return tower


def _from_hugging_face(path, pretrained, image_size, options) -> DeemVisionTower:
    if isinstance(pretrained, str):
        raise ValueError(
            f"{path} brings its own weights, so `pretrained` must be left out, or be `False` for new weights; "
            f"got {pretrained!r}."
        )
    try:
        config = AutoConfig.from_pretrained(**at_revision(path))
    except OSError as error:
        raise ValueError(
            f"Found no model at {path!r}. Give a folder with a config.json, a hub id that can be reached, or a model "
            f"name of open_clip."
        ) from error
    if config.model_type == DeemVisionConfig.model_type:
        return _saved_tower(path, config, pretrained, image_size)
    vision_config = getattr(config, "vision_config", config)
    tower = DeemVisionTower(
        DeemVisionConfig(
            encoder_config=vision_config,
            image_size=image_size,
            **_normalisation(path, vision_config, needed=pretrained is not False),
            **options,
        )
    )
    if pretrained is not False:
        _load_encoder(tower, path)
    return tower


def _saved_tower(path, config, pretrained, image_size) -> DeemVisionTower:
    if image_size is not None and image_size != config.image_size:
        raise ValueError(
            f"{path} is a tower for images of {config.image_size} pixels, got `image_size={image_size}`. Leave it out."
        )
    if pretrained is False:
        return DeemVisionTower(config)
    with naming_the_checkpoint("vision_tower", path):
        tower, info = DeemVisionTower.from_pretrained(**at_revision(path), output_loading_info=True)
    _refuse_bad_keys(path, info["missing_keys"], info["unexpected_keys"])
    return tower.train()


def _normalisation(path: str, vision_config: PreTrainedConfig, needed: bool) -> dict[str, list[float]]:
    timm = getattr(vision_config, "pretrained_cfg", None) or {}
    known = {f"image_{name}": timm[name] for name in ("mean", "std") if name in timm}
    with contextlib.suppress(OSError):  # a model saved without its processor
        known |= CLIPImageProcessor.get_image_processor_dict(**at_revision(path))[0]
    statistics = {name: list(known[name]) for name in ("image_mean", "image_std") if name in known}
    if needed and len(statistics) < 2:
        raise ValueError(
            f"{path} does not say how pictures are normalised for its weights: it has no preprocessor_config.json "
            f"with `image_mean` and `image_std`. Save the model's image processor there."
        )
    return statistics


def _load_encoder(tower: DeemVisionTower, path: str):
    with naming_the_checkpoint("vision_tower", path):
        source, info = AutoModel.from_pretrained(**at_revision(path), output_loading_info=True)
    model = tower.encoder.model
    parts = [name for name, part in source.named_modules() if isinstance(part, type(model))]
    if not parts:
        raise ValueError(f"{path} holds no {type(model).__name__}, though its config has one. Check that both fit.")
    # Of a larger model the vision part, whose keys alone count.
    keys = ([key for key in info[kind] if key.startswith(parts[0])] for kind in ("missing_keys", "unexpected_keys"))
    _refuse_bad_keys(path, *keys)
    model.load_state_dict(source.get_submodule(parts[0]).state_dict(), strict=True)


def _refuse_bad_keys(path, missing, unexpected):
    if missing or unexpected:
        raise ValueError(
            f"The weights in {path} do not fit its config. Missing: {sorted(missing)[:5]} ({len(missing)} in all). "
            f"Left over: {sorted(unexpected)[:5]} ({len(unexpected)} in all). Check that the files belong together."
        )
