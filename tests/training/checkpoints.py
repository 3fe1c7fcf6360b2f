"""Tiny checkpoints of vision-language families, each with a real processor that loads by the Auto classes."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from ..families.builders import FAMILIES
from ..families.vocabulary import IMAGE, VISION, Family, text

QUESTION, ANSWER = "What is in the picture?", "A red square."
CORPUS = [f"{QUESTION} {ANSWER} It lies on a blue ground. user assistant model User Assistant"] * 4

# Chat templates as the families have them, but for tools, dates and other kinds of content.
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = CHATML.replace("{{ bos_token }}", "").replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
SMOLVLM = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}{% if m['content'][0]['type'] == 'image' %}:"
    "{% else %}: {% endif %}{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}<image>"
    "{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST]{% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}[IMG]{% endif %}{% endfor %}[/INST]{% else %}"
    "{{ m['content'][0]['text'] + eos_token }}{% endif %}{% endfor %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|image|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<start_of_image>{% else %}{{ c['text'] | trim }}"
    "{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@dataclass
class Checkpoint:
    """
    How a family's published checkpoints are written.

    Args:
        family (`Family`): Builds the model and the image processor.
        template (`str`): Chat template.
        specials (`list[str]`): Special tokens; the last stands for an image in `input_ids`.
        bos, eos (`str`, *optional*): Beginning and end of a text.
        processor (`Callable`): `(image processor, tokenizer, template) -> processor`.
        ids (`dict`): Field of the config to special token.
        padding (`str`): The tokenizer's padding side.
        sentencepiece (`bool`): Whether its tokenizer is like SentencePiece's, with spaces as letters.
        named (`dict`): Special tokens that the tokenizer has by name, in place of `specials`.
        turn_end (`str`, *optional*): Ends an answer; `eos` by default.
    """

    family: Family
    template: str
    specials: list[str]
    bos: str | None
    eos: str
    processor: Callable
    ids: dict[str, str]
    padding: str = "right"
    sentencepiece: bool = False
    named: dict[str, str] = field(default_factory=dict)
    turn_end: str | None = None


def _qwen(name, processor_class, video_class):
    return Checkpoint(
        FAMILIES[name],
        QWEN,
        ["<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|im_start|>", "<|image_pad|>"],
        None,
        "<|im_end|>",
        lambda images, words, template: processor_class(images, words, video_class(), chat_template=template),
        {
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        },
        padding="left",
    )


def _pixtral(family, merge):
    return Checkpoint(
        family,
        MISTRAL,
        ["[INST]", "[/INST]", "[IMG_BREAK]", "[IMG_END]", "[IMG]"],
        "<s>",
        "</s>",
        lambda images, words, template: hf.PixtralProcessor(
            images, words, patch_size=8, spatial_merge_size=merge, chat_template=template
        ),
        {"image_token_index": "[IMG]"},
        padding="left",
    )


# A LLaVA with Pixtral's tower.
PIXTRAL = replace(
    FAMILIES["mistral3"],
    config=lambda: hf.LlavaConfig(
        vision_config=hf.PixtralVisionConfig(**{**VISION, "image_size": 64, "head_dim": 16}),
        text_config=text(hf.MistralConfig),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    ),
)
CHECKPOINTS = {
    "qwen3_vl": _qwen("qwen3_vl", hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor),
    "qwen2_5_vl": _qwen("qwen2_5_vl", hf.Qwen2_5_VLProcessor, hf.Qwen2VLVideoProcessor),
    "smolvlm": Checkpoint(
        FAMILIES["smolvlm"],
        SMOLVLM,
        [
            "<|im_start|>",
            "<fake_token_around_image>",
            "<global-img>",
            *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
            "<image>",
        ],
        "<|im_start|>",
        "<end_of_utterance>",
        lambda images, words, template: hf.SmolVLMProcessor(
            images, words, hf.SmolVLMVideoProcessor(), image_seq_len=4, chat_template=template
        ),
        {"image_token_id": "<image>"},
    ),
    "mistral3": _pixtral(FAMILIES["mistral3"], 2),
    "pixtral": _pixtral(PIXTRAL, 1),
    "mllama": Checkpoint(
        FAMILIES["mllama"],
        LLAMA,
        ["<|start_header_id|>", "<|end_header_id|>", "<|image|>"],
        "<|begin_of_text|>",
        "<|eot_id|>",
        hf.MllamaProcessor,
        {"image_token_index": "<|image|>"},
        padding="left",
    ),
    "gemma3": Checkpoint(
        FAMILIES["gemma3"],
        GEMMA,
        ["<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"],
        "<bos>",
        "<eos>",
        lambda images, words, template: hf.Gemma3Processor(images, words, template, image_seq_length=4),
        {
            "image_token_id": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
        padding="left",
        sentencepiece=True,
        named={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        turn_end="<end_of_turn>",
    ),
    "lfm2_vl": Checkpoint(
        FAMILIES["lfm2_vl"],
        CHATML.replace("IMAGE", "<image>"),
        ["<|im_start|>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", "<image>"],
        "<|startoftext|>",
        "<|im_end|>",
        hf.Lfm2VlProcessor,
        {"image_token_id": "<image>"},
        padding="left",
    ),
}


def trained_tokenizer(case: Checkpoint) -> PreTrainedTokenizerFast:
    """Trains a tokenizer with merges: byte-level BPE, or one whose spaces are letters, as SentencePiece makes it."""
    # The image's token comes last, as in Llama 3.2, where it has an embedding but no logit.
    specials = ["<pad>", *(["<unk>"] if case.sentencepiece else []), case.bos, case.eos, *case.specials[:-1]]
    specials = list(dict.fromkeys(token for token in specials if token))
    tokenizer = Tokenizer(models.BPE())
    if case.sentencepiece:
        alphabet = [chr(code) for code in range(33, 127)] + ["▁", "\n"]
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    size = len(specials) + len(alphabet) + 40
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=specials)
    tokenizer.train_from_iterator(CORPUS, trainer)
    if case.sentencepiece:
        trained = json.loads(tokenizer.to_str())["model"]
        words = trained["vocab"]
        words |= {f"<0x{value:02X}>": len(words) + value for value in range(256)}
        merges = [tuple(pair) for pair in trained["merges"]]
        tokenizer.model = models.BPE(words, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer.add_special_tokens([case.specials[-1]])
    names = {"bos_token": case.bos, "unk_token": "<unk>" if case.sentencepiece else None}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token=case.eos,
        padding_side=case.padding,
        extra_special_tokens=case.named or case.specials,
        **{name: token for name, token in names.items() if token},
    )


def write_checkpoint(name: str, folder: Path) -> type:
    """
    Writes a tiny checkpoint of a family with its processor.

    Returns:
        `type`: The model's class.
    """
    case = CHECKPOINTS[name]
    words, config = trained_tokenizer(case), case.family.config()
    for field_name, token in case.ids.items():
        setattr(config, field_name, words.convert_tokens_to_ids(token))
    language = config.get_text_config()
    # Llama 3.2 has eight embeddings more than logits, the first of them the image's.
    language.vocab_size = len(words) - 1 if name == "mllama" else len(words)
    for kind in ("pad", "bos", "eos"):
        setattr(language, f"{kind}_token_id", getattr(words, f"{kind}_token_id"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config).float()
        for parameter in model.parameters():
            if not parameter.any():  # gates and projectors that start at zero, as no trained one is
                nn.init.normal_(parameter, std=0.1)
    model.generation_config.pad_token_id = words.pad_token_id
    model.generation_config.eos_token_id = words.convert_tokens_to_ids(case.turn_end or case.eos)
    model.save_pretrained(folder)
    case.processor(case.family.processor(), words, case.template).save_pretrained(folder)
    return type(model)
