"""Fits the processors of vision-language models to the tower: image size, normalisation, number of image tokens."""

import copy

from transformers import PreTrainedConfig, ProcessorMixin
from transformers.image_utils import SizeDict

from .configuration import DeemVisionConfig
from .image_processing import build_image_processor

# Put before a language model's chat template, which knows contents as strings only, to join content parts to strings.
_JOIN_PARTS = """\
{%- set joined = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set content = namespace(text='') -%}
{%- if message['content'] is string -%}
{%- set content.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- set content.text = content.text + (IMAGE if part['type'] == 'image' else part['text']) -%}
{%- endfor -%}
{%- endif -%}
{%- set joined.messages = joined.messages + [dict(message, content=content.text)] -%}
{%- endfor -%}
{%- set messages = joined.messages -%}
"""


def join_parts(chat_template: str, image_token: str) -> str:
    """
    Returns a tokenizer's chat template as one that takes content parts; it stays as it is if it knows of images.

    Args:
        chat_template (`str`): Jinja template of a tokenizer. Those of language models take contents as strings only.
        image_token (`str`): What stands for an image in the prompt; a line break follows it.
    """
    if "image" in chat_template:
        return chat_template
    return _JOIN_PARTS.replace("IMAGE", repr(image_token + "\n")) + chat_template


def llava_token_count(tower_config: DeemVisionConfig) -> dict[str, int]:
    """
    Settings with which LLaVA's processors count as many image tokens as the tower returns.

    They count `(image_size // patch_size)**2 + num_additional_image_tokens`. Queries form no grid, so with a resampler
    the whole image is one patch and the other tokens are additional.
    """
    if tower_config.num_queries:
        return {
            "patch_size": tower_config.image_size,
            "num_additional_image_tokens": tower_config.num_image_tokens - 1,
        }
    return {"patch_size": tower_config.patch_size, "num_additional_image_tokens": int(tower_config.class_token)}


def fit_processor(processor: ProcessorMixin, config: PreTrainedConfig) -> ProcessorMixin:
    """
    Fits a processor to the tower that a vision-language model now holds.

    Args:
        processor (`ProcessorMixin`): The processor that belonged to the model; it is not changed.
        config (`PreTrainedConfig`): The model's configuration, with the new tower's as `vision_config`.

    Returns:
        `ProcessorMixin`: A processor of the same class.
    """
    processor = copy.deepcopy(processor)
    _FIT[config.model_type](processor, config, config.vision_config)
    return processor


def _fit_llava(processor, config, tower_config):
    processor.image_processor = build_image_processor(tower_config)
    _fit_token_count(processor, config, tower_config)


def _fit_llava_next(processor, config, tower_config):
    _fit_tiles(processor, tower_config)
    size = tower_config.image_size
    processor.image_processor.size = SizeDict(shortest_edge=size)
    processor.image_processor.crop_size = SizeDict(height=size, width=size)
    processor.image_processor.image_grid_pinpoints = config.image_grid_pinpoints
    _fit_token_count(processor, config, tower_config)


def _fit_token_count(processor, config, tower_config):
    # VipLLaVA has no such setting in its configuration: it always crops.
    processor.vision_feature_select_strategy = getattr(config, "vision_feature_select_strategy", "default")
    for name, value in llava_token_count(tower_config).items():
        setattr(processor, name, value)


def _fit_llava_onevision(processor, config, tower_config):
    _fit_tiles(processor, tower_config)
    processor.image_processor.image_grid_pinpoints = config.image_grid_pinpoints
    processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    processor.num_image_tokens = tower_config.num_image_tokens


def _fit_paligemma(processor, config, tower_config):
    processor.image_processor = build_image_processor(tower_config)
    processor.image_processor.image_seq_length = tower_config.num_image_tokens
    processor.image_seq_length = tower_config.num_image_tokens


def _fit_aya_vision(processor, config, tower_config):
    _fit_tiles(processor, tower_config)
    processor.img_size = tower_config.image_size
    processor.patch_size = tower_config.patch_size * config.downsample_factor


def _fit_cohere2_vision(processor, config, tower_config):
    _fit_tiles(processor, tower_config)
    # In spite of its name this counts the image tokens along a side of a tile.
    tokens_per_side = tower_config.grid_size // config.downsample_factor
    processor.image_processor.patch_size = tokens_per_side
    processor.patch_size = tokens_per_side


def _fit_tiles(processor, tower_config):
    """Keeps an image processor that cuts tiles, with the tower's tile size and normalisation."""
    size = tower_config.image_size
    processor.image_processor.size = SizeDict(height=size, width=size)
    processor.image_processor.image_mean = tuple(tower_config.image_mean)
    processor.image_processor.image_std = tuple(tower_config.image_std)


_FIT = {
    "llava": _fit_llava,
    "vipllava": _fit_llava,
    "llava_next": _fit_llava_next,
    "llava_onevision": _fit_llava_onevision,
    "paligemma": _fit_paligemma,
    "aya_vision": _fit_aya_vision,
    "cohere2_vision": _fit_cohere2_vision,
}
