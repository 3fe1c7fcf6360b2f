"""A LLaVA made of a language model and a vision tower."""

import copy

import torch
from torch import nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .image_processing import build_image_processor
from .processors import join_parts

IMAGE_TOKEN = "<image>"


def assemble_llava(
    source: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tower: nn.Module
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """
    Makes a LLaVA and its processor of a language model and a vision tower, with a new projector between them.

    The parts are not copied: language model and tower now belong to the LLaVA. The tokenizer is copied, and learns
    `<image>` if it does not know it; the embeddings grow to hold it.

    Args:
        source (`PreTrainedModel`): A causal language model, or a LLaVA, whose own is taken.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        tower (`DeemVisionTower`): The vision tower.

    Raises:
        ValueError: If `source` is another kind of vision-language model.
    """
    if hasattr(source.config, "vision_config") and not isinstance(source, LlavaForConditionalGeneration):
        raise ValueError(
            f"The vision tower of a LLaVA can be exchanged, and this is a {type(source).__name__}. Leave "
            f"`model.vision_tower` out (feedback works on the model's own tower), or give `model.language_model`."
        )
    tokenizer = copy.deepcopy(tokenizer)
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    config = LlavaConfig(
        text_config=source.config.get_text_config(),
        vision_config=tower.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=tower.config.num_image_tokens,
        vision_feature_layer=-1 if tower.num_layers == 1 else -2,  # LLaVA reads the second-last layer
        vision_feature_select_strategy="full",
    )
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(config)
    llava.model.language_model = source.get_decoder()
    llava.lm_head = source.get_output_embeddings()
    llava.model.vision_tower = tower.to(device=source.device, dtype=source.dtype)
    projector = type(llava.model.multi_modal_projector)(config)
    for module in projector.modules():
        llava._init_weights(module)
    llava.model.multi_modal_projector = projector.to(device=source.device, dtype=source.dtype)
    llava.generation_config = copy.deepcopy(source.generation_config)
    if len(tokenizer) > llava.get_input_embeddings().num_embeddings:
        llava.resize_token_embeddings(len(tokenizer))

    processor = LlavaProcessor(
        image_processor=build_image_processor(tower),
        tokenizer=tokenizer,
        image_token=IMAGE_TOKEN,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        # It counts (image size / patch size)^2 and additional tokens: the whole image is one patch.
        patch_size=tower.config.image_size,
        num_additional_image_tokens=tower.config.num_image_tokens - 1,
        # A saved processor comes back with its tokenizer's template unless it has one of its own.
        chat_template=join_parts(tokenizer.chat_template, IMAGE_TOKEN) if tokenizer.chat_template else None,
    )
    return llava.train(source.training), processor
