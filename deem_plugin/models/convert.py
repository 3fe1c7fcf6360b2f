"""deem convert-official: a checkpoint of the authors' code becomes a folder that transformers loads."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from ..vision.image_processing import build_image_processor
from ..vision.processors import join_parts
from .configuration import DeemConfig
from .deem import DeemForConditionalGeneration
from .official import Conversion, convert_state_dict
from .official_config import config_options
from .processing import IMAGE_START_TOKEN, IMAGE_TOKEN, DeemProcessor

# The official new tokens in the order of their ids, whatever text they had.
NEW_TOKENS = (IMAGE_START_TOKEN, IMAGE_TOKEN, "<ref>", "</ref>", "<box>", "</box>")


def load_official(path: str | Path) -> dict[str, torch.Tensor]:
    """
    Loads a state dict from one file or from all shards of a folder; never any code (`weights_only`).

    Raises:
        ValueError: If there is no such file, no weights in the folder, or two shards hold one weight.
    """
    path = Path(path).expanduser()
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(
            f"No weights at {path}. Give a .safetensors, .bin or .pth file, or a folder with *.safetensors or "
            f"pytorch_model*.bin."
        )
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            part = load_file(file)
        else:
            part = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            part = part.get("module", part.get("state_dict", part))
        if twice := sorted(part.keys() & weights.keys()):
            raise ValueError(f"{file} holds {len(twice)} weights of an earlier file again, among them {twice[0]}.")
        weights |= part
    return weights


def convert_official(
    checkpoint: str | Path,
    out: str | Path,
    language_model: str,
    image_size: int = 256,
    image_decoder_heads: int = 16,
) -> Conversion:
    """
    Converts a checkpoint that was trained with the authors' code, or with MM-Interleaved's names.

    Args:
        checkpoint (`str` or `Path`): See `load_official`.
        out (`str` or `Path`): Folder for model and processor.
        language_model (`str`): Folder or hub id whose config and tokenizer the training had: `lmsys/vicuna-7b-v1.5`.
        image_size (`int`, *optional*, defaults to 256): Side of the encoder's input; 448 behind the first stage.
        image_decoder_heads (`int`, *optional*, defaults to 16): As trained.

    Returns:
        `Conversion`: What became of each key; also written to `conversion.json` in `out`.

    Raises:
        ValueError: If a weight has no place, is missing, or has another shape than the language model asks for.
    """
    official = load_official(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    first = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": list(NEW_TOKENS)}, replace_extra_special_tokens=False)
    config = DeemConfig(
        text_config=AutoConfig.from_pretrained(language_model).to_dict(),
        num_new_tokens=len(NEW_TOKENS),
        first_new_token_id=first,
        **config_options(official, image_size, image_decoder_heads),
    )
    conversion = convert_state_dict(official, config.image_start_token_id)
    model = DeemForConditionalGeneration(config)
    expected = model.state_dict()
    problems = [f"{name} is missing" for name in sorted(expected.keys() - conversion.weights.keys())]
    problems += [f"{name} is left over" for name in sorted(conversion.weights.keys() - expected.keys())]
    problems += [
        f"{name} is {tuple(value.shape)} instead of {tuple(expected[name].shape)}"
        for name, value in conversion.weights.items()
        if name in expected and value.shape != expected[name].shape
    ]
    if problems:
        raise ValueError(
            f"{checkpoint} does not fit a model on {language_model}: {'; '.join(problems[:5])} ({len(problems)} in "
            f"all). Give the language model that it was trained with, or convert the whole checkpoint."
        )
    model.load_state_dict(conversion.weights)
    out = Path(out)
    model.to(next(iter(conversion.weights.values())).dtype).save_pretrained(out)
    DeemProcessor(
        image_processor=build_image_processor(model.vision_tower),
        tokenizer=tokenizer,
        num_image_tokens=config.vision_config.num_image_tokens,
        chat_template=join_parts(tokenizer.chat_template, IMAGE_TOKEN) if tokenizer.chat_template else None,
    ).save_pretrained(out)
    report = {"checkpoint": str(checkpoint), "renamed": conversion.renamed, "ignored": conversion.ignored}
    (out / "conversion.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    return conversion
