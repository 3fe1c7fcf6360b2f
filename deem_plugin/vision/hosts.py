"""Which vision-language models can hold the tower, how it is put into them, and where a model keeps its own."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import logging

from .configuration import DeemVisionConfig
from .image_processing import build_image_processor
from .processors import fit_processor, join_parts, llava_token_count
from .tower import DeemVisionTower

logger = logging.get_logger(__name__)

IMAGE_TOKEN = "<image>"


@dataclass(frozen=True)
class Host:
    """
    How a family of vision-language models reads its tower.

    Args:
        crop (`str`): Whether the first token is cropped: `"configurable"` (by `vision_feature_select_strategy`),
            `"always"` or `"never"`.
        needs_grid (`bool`): Whether the tokens must form a square grid of patches.
    """

    crop: str
    needs_grid: bool


HOSTS = {
    "llava": Host(crop="configurable", needs_grid=False),
    "vipllava": Host(crop="always", needs_grid=False),
    "llava_next": Host(crop="configurable", needs_grid=True),
    "llava_onevision": Host(crop="configurable", needs_grid=True),
    "paligemma": Host(crop="never", needs_grid=False),
    "aya_vision": Host(crop="configurable", needs_grid=True),
    "cohere2_vision": Host(crop="never", needs_grid=True),
}

REFUSED = {
    "internvl": (
        "its configuration class ignores the type of `vision_config`, so that `from_pretrained` would silently come "
        "back with an InternVL tower of random weights"
    ),
    "fast_vlm": "its projector reads the feature map of timm's FastViT",
    "got_ocr2": "its SAM encoder is hard-coded",
    "perception_lm": "it builds its tower from timm arguments only",
}


def check_host(config: PreTrainedConfig, tower_config: DeemVisionConfig | None = None):
    """
    Checks that a vision-language model can hold the tower.

    Args:
        config (`PreTrainedConfig`): Configuration of the vision-language model.
        tower_config (`DeemVisionConfig`, *optional*): The tower; without it only the kind of model is checked.

    Raises:
        `ValueError`: With the reason, and what to do instead.
    """
    model_type = config.model_type
    known = ", ".join(HOSTS)
    if model_type in REFUSED:
        raise ValueError(
            f"A model of type '{model_type}' cannot hold another vision tower: {REFUSED[model_type]}. Keep its own "
            f"tower (feedback works on that too), or use one of: {known}."
        )
    if model_type not in HOSTS:
        raise ValueError(
            f"It is not known whether a model of type '{model_type}' can hold another vision tower. Known to work: "
            f"{known}. Keep the model's own tower, or use one of these."
        )
    if tower_config is None:
        return
    host = HOSTS[model_type]
    if host.needs_grid and tower_config.num_queries:
        raise ValueError(
            f"A model of type '{model_type}' lays its image tokens out as a square grid, but the tower returns "
            f"{tower_config.num_queries} queries. Build the tower with `num_queries=0`."
        )
    if host.crop == "always" and not tower_config.class_token:
        raise ValueError(
            f"A model of type '{model_type}' always crops the first token, but the tower starts with a patch, which "
            f"would be lost. Build the tower with `class_token=True`."
        )
    if host.crop == "never" and host.needs_grid and tower_config.class_token:
        raise ValueError(
            f"A model of type '{model_type}' lays out all tokens as a square grid, but the tower starts with a class "
            f"token. Build the tower with `class_token=False`."
        )
    factor = getattr(config, "downsample_factor", 1)
    if tower_config.grid_size % factor and host.needs_grid:
        raise ValueError(
            f"A model of type '{model_type}' merges {factor} x {factor} patches, but the tower's grid has "
            f"{tower_config.grid_size} patches a side. Choose an `image_size` that is a multiple of "
            f"{factor * tower_config.patch_size}."
        )


def crops_class_token(config: PreTrainedConfig) -> bool:
    """Whether a vision-language model can crop a class token, so that its tower should start with one."""
    check_host(config)
    return HOSTS[config.model_type].crop != "never"


def _read_tower(config: PreTrainedConfig, tower: DeemVisionTower) -> dict:
    """Settings with which the host reads the whole output of the tower and crops nothing but a class token."""
    settings = {"vision_config": tower.config}
    tower_config = tower.config
    host = HOSTS[config.model_type]
    if host.crop == "configurable":
        settings["vision_feature_select_strategy"] = "default" if tower_config.class_token else "full"
    if hasattr(config, "vision_feature_layer"):
        layers = config.vision_feature_layer
        wanted = [layers] if isinstance(layers, int) else layers
        if not all(-tower.num_layers <= layer < tower.num_layers for layer in wanted):
            logger.warning(
                f"`vision_feature_layer` is set from {layers} to -1: the new tower has {tower.num_layers} layer(s)."
            )
            settings["vision_feature_layer"] = -1
    if hasattr(config, "image_seq_length"):
        cropped = host.crop == "always" or settings.get("vision_feature_select_strategy") == "default"
        settings["image_seq_length"] = tower_config.num_image_tokens - int(cropped)
    if hasattr(config, "image_grid_pinpoints"):
        old_size = config.vision_config.image_size
        settings["image_grid_pinpoints"] = [
            [side * tower_config.image_size // old_size for side in sides] for sides in config.image_grid_pinpoints
        ]
    return settings


def _move_modules(source: nn.Module, target: nn.Module, keep: tuple[str, ...]):
    """Gives `target` the children and parameters of `source`, but for the names in `keep`."""
    for name, child in source.named_children():
        if name not in keep:
            setattr(target, name, child)
    for name, parameter in source.named_parameters(recurse=False):
        setattr(target, name, parameter)


def mount_tower(
    vlm: PreTrainedModel, tower: DeemVisionTower, processor: ProcessorMixin | None = None
) -> tuple[PreTrainedModel, ProcessorMixin | None]:
    """
    Puts the tower in the place of a vision-language model's own.

    The language model is not copied: it now belongs to the returned model, as does the tower, which takes over device
    and dtype. The projector keeps its weights where it fits, otherwise a new one is made, to be trained.

    Args:
        vlm (`PreTrainedModel`): One of the types in `HOSTS`.
        tower (`DeemVisionTower`): The new tower.
        processor (`ProcessorMixin`, *optional*): The model's processor.

    Returns:
        `tuple`: A model of the same class, and a processor (`None` if none was given) that resizes and normalises for
        the new tower and writes as many image tokens as it returns.

    Raises:
        `ValueError`: If the model cannot hold this tower, see [`check_host`].
    """
    check_host(vlm.config, tower.config)
    config = copy.copy(vlm.config)  # shallow: the language model keeps sharing its part of the configuration
    for name, value in _read_tower(vlm.config, tower).items():
        setattr(config, name, value)
    if config.model_type == "paligemma":
        config.vision_config.projection_dim = config.projection_dim

    with torch.device("meta"):
        mounted = type(vlm)(config)
    old, new = vlm.base_model, mounted.base_model
    if old is not vlm:
        _move_modules(vlm, mounted, keep=(vlm.base_model_prefix,))
    _move_modules(old, new, keep=("vision_tower", "multi_modal_projector"))
    new.vision_tower = tower.to(device=vlm.device, dtype=vlm.dtype)
    shapes = [{name: p.shape for name, p in part.multi_modal_projector.named_parameters()} for part in (old, new)]
    new.multi_modal_projector = old.multi_modal_projector if shapes[0] == shapes[1] else _new_projector(new, vlm)
    mounted.generation_config = vlm.generation_config
    mounted.train(vlm.training)
    return mounted, None if processor is None else fit_processor(processor, config)


def _new_projector(model: PreTrainedModel, like: PreTrainedModel) -> nn.Module:
    """Makes a projector with new weights for a model that was built without memory."""
    projector = type(model.multi_modal_projector)(model.config)
    for module in projector.modules():
        model._init_weights(module)
    return projector.to(device=like.device, dtype=like.dtype)


def assemble_llava(
    language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tower: nn.Module
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """
    Makes a LLaVA of a language model and a vision tower, with a new projector between them.

    The parts are not copied: language model and tower now belong to the LLaVA. The tokenizer is copied, and learns
    `<image>` if it does not know it; the embeddings grow to hold it.

    Args:
        language_model (`PreTrainedModel`): A causal language model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        tower (`DeemVisionTower`): The vision tower.

    Returns:
        `tuple[LlavaForConditionalGeneration, LlavaProcessor]`: Model and processor.
    """
    tokenizer = copy.deepcopy(tokenizer)
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    single_output = tower.num_layers == 1
    config = LlavaConfig(
        text_config=language_model.config,
        vision_config=tower.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=tower.config.num_image_tokens - int(tower.config.class_token),
        vision_feature_layer=-1 if single_output else -2,  # LLaVA reads the second-last layer
        vision_feature_select_strategy="default" if tower.config.class_token else "full",
    )
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(config)
    llava.model.language_model = language_model.base_model
    llava.lm_head = language_model.get_output_embeddings()
    llava.model.vision_tower = tower.to(device=language_model.device, dtype=language_model.dtype)
    llava.model.multi_modal_projector = _new_projector(llava.model, language_model)
    llava.generation_config = copy.deepcopy(language_model.generation_config)
    if len(tokenizer) > llava.get_input_embeddings().num_embeddings:
        llava.resize_token_embeddings(len(tokenizer))

    processor = LlavaProcessor(
        image_processor=build_image_processor(tower),
        tokenizer=tokenizer,
        image_token=IMAGE_TOKEN,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        # A saved processor comes back with its tokenizer's template unless it has one of its own.
        chat_template=join_parts(tokenizer.chat_template, IMAGE_TOKEN) if tokenizer.chat_template else None,
        **llava_token_count(tower.config),
    )
    return llava.train(language_model.training), processor
