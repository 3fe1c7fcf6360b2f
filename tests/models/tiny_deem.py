"""A tiny interleaved model of the real classes: ConvNeXt tower with 4 queries, 2-layer Llama, SD's UNet and VAE."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deem_plugin.models import assemble_deem
from deem_plugin.vision import DeemVisionConfig, DeemVisionTower

from ..feedback.tiny_diffusion_models import CONTEXT_DIM
from .official_labels import make_labels

QUERIES = 4
SIZE = 64  # pixels of the tower


def language_tokenizer() -> PreTrainedTokenizerFast:
    """Makes a byte-level tokenizer that writes `<s>` before each text and knows nothing of pictures."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="right",
        chat_template=(
            "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
            "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        ),
    )


def tiny_tower(**options) -> DeemVisionTower:
    """Makes a ConvNeXt tower of 64 pixels, 4 x 4 patches and 4 queries of width 32."""
    config = {
        "open_clip_config": {
            "timm_model_name": "convnext_base",
            "image_size": SIZE,
            "timm_kwargs": {"depths": [1, 1, 2, 1], "dims": [8, 16, 32, 64], "ls_init_value": 0.5},
        },
        "embed_dim": 32,
        "num_queries": QUERIES,
        "resampler_hidden_size": 32,
        "resampler_num_layers": 1,
        "resampler_num_heads": 4,
        "resampler_intermediate_size": 64,
    }
    return DeemVisionTower(DeemVisionConfig(**config | options))


def tiny_language_model(tokenizer, **options) -> LlamaForCausalLM:
    """Makes a 2-layer Llama of width 32."""
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**config | options))


def tiny_deem(seed: int = 0, language_options=None, tower_options=None, tokenizer=None, **options):
    """Makes model and processor; heads and queries start large enough for a test to see what comes through them."""
    torch.manual_seed(seed)
    tokenizer = tokenizer or language_tokenizer()
    model, processor = assemble_deem(
        tiny_language_model(tokenizer, **language_options or {}),
        tokenizer,
        tiny_tower(**tower_options or {}),
        **{"context_dim": CONTEXT_DIM, "image_decoder_heads": 4, **options},
    )
    with torch.no_grad():
        heads = [] if model.denoising is None else [model.denoising.feedback_head]
        for head in (model.connector, *heads, model.new_head):
            torch.nn.init.normal_(head.weight, std=0.5)
        for module in model.vision_tower.resampler.modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=0.3)
    return model, processor


def official_labels(processor, inputs):
    """Labels by the official rules, for texts that begin with `<s>`."""
    return make_labels(
        inputs["input_ids"],
        inputs["attention_mask"],
        bos_token_id=1,
        image_token_id=processor.image_token_id,
        image_start_token_id=processor.image_start_token_id,
    )
