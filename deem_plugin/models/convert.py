"""deem convert-official: a checkpoint of the authors' code becomes a folder that transformers loads."""

import functools
import json
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from ..files import naming_the_checkpoint
from ..hub import at_revision
from ..resources import recipes_dir
from .assembly import add_new_tokens, processor_of, stop_at_pictures
from .configuration import DeemConfig
from .deem import DeemForConditionalGeneration
from .official import Conversion, convert_state_dict
from .official_config import config_options

# The official new tokens behind those of pictures, in the order of their ids, whatever text they had.
REGION_TOKENS = ("<ref>", "</ref>", "<box>", "</box>")


def load_official(path: str | Path) -> dict[str, torch.Tensor]:
    """
    Loads a state dict from one file or from all shards of a folder; never any code (`weights_only`).

    Raises:
        ValueError: If there is no such file, no weights in the folder or weights in two formats, a file holds
            something else, or two shards hold one weight.
    """
    path = Path(path).expanduser()
    kinds = (
        [sorted(path.glob(kind)) for kind in ("*.safetensors", "pytorch_model*.bin")] if path.is_dir() else [[path]]
    )
    files, *others = [files for files in kinds if files] or [[]]
    if others:
        raise ValueError(
            f"{path} holds weights twice, in {files[0].name} and in {others[0][0].name}, and they may differ. Move "
            f"those that are not meant elsewhere."
        )
    if not files or not files[0].is_file():
        raise ValueError(
            f"No weights at {path}. Give a .safetensors, .bin or .pth file, or a folder with *.safetensors or "
            f"pytorch_model*.bin."
        )
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        part = _load(file)
        if twice := sorted(part.keys() & weights.keys()):
            raise ValueError(f"{file} holds {len(twice)} weights of an earlier file again, among them {twice[0]}.")
        weights |= part
    return weights


def _load(file):
    """Loads the state dict of one file; what torch and safetensors raise on a foreign one may be anything."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # Files in torch's format before 1.6 are no archives and cannot be mapped.
        part = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:
        raise ValueError(
            f"{file} cannot be read as weights ({type(error).__name__}): it is damaged, of another format, or holds "
            f"Python objects, which are never loaded. Expected a .safetensors file, or a state dict that `torch.save` "
            f"wrote."
        ) from error
    for wrapper in ("module", "state_dict"):  # of DeepSpeed and Lightning
        part = part[wrapper] if isinstance(part, dict) and wrapper in part else part
    whole = isinstance(part, dict) and all(isinstance(name, str) for name in part)
    if not whole or not all(isinstance(value, torch.Tensor) for value in part.values()):
        raise ValueError(
            f"{file} holds a {type(part).__name__}; expected a dictionary of tensors by name, or one under the name "
            f"`module` or `state_dict`."
        )
    return part


def convert_official(
    checkpoint: str | Path,
    out: str | Path,
    language_model: str,
    image_size: int = 256,
    image_decoder_heads: int = 16,
    resampler_heads: int = 12,
) -> Conversion:
    """
    Converts a checkpoint that was trained with the authors' code and a ConvNeXt. Each weight keeps its dtype; the
    config has one that holds all of them.

    Args:
        checkpoint (`str` or `Path`): See `load_official`.
        out (`str` or `Path`): Folder for model and processor.
        language_model (`str`): Folder or hub id whose config and tokenizer the training had: `lmsys/vicuna-7b-v1.5`.
            If the tokenizer brings no chat template, the processor gets Vicuna's.
        image_size (`int`, *optional*, defaults to 256): Side of the encoder's input; 448 behind the first stage.
        image_decoder_heads (`int`, *optional*, defaults to 16): As trained.
        resampler_heads (`int`, *optional*, defaults to 12): As trained, of a resampler without QK norm; with one, its
            weights tell.

    Returns:
        `Conversion`: What became of each key; also written to `conversion.json` in `out`.

    Raises:
        ValueError: If an option is not positive, `out` is a file, the language model cannot be loaded, or a weight has
            no place, is missing, or has another shape than the language model asks for.
    """
    out, numbers = Path(out).expanduser(), (image_size, image_decoder_heads, resampler_heads)
    if min(numbers) < 1:
        raise ValueError(f"Image size and heads of image decoder and resampler are {numbers}; they must be positive.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; the converted model needs a folder. Give another name.")
    with naming_the_checkpoint("language_model", language_model):
        text_config = AutoConfig.from_pretrained(**at_revision(language_model)).to_dict()
        tokenizer = AutoTokenizer.from_pretrained(**at_revision(language_model))
    # The official head is no copy of the embedding, whatever the language model had.
    text_config["tie_word_embeddings"] = False
    official = load_official(checkpoint)
    options = config_options(official, *numbers)
    conversion = convert_state_dict(official, vocabulary=len(tokenizer))
    config = DeemConfig(text_config=text_config, **add_new_tokens(tokenizer, REGION_TOKENS), **options)
    with torch.device("meta"):
        model = DeemForConditionalGeneration(config)
    _check_fit(model, conversion, f"{checkpoint} does not fit a model on {language_model}")
    model.load_state_dict(conversion.weights, assign=True)
    stop_at_pictures(model)
    model.save_pretrained(out)
    config.dtype = functools.reduce(torch.promote_types, {value.dtype for value in conversion.weights.values()})
    config.save_pretrained(out)
    template = tokenizer.chat_template or (recipes_dir() / "vicuna_v1.jinja").read_text(encoding="utf-8")
    processor_of(config, tokenizer, template).save_pretrained(out)
    report = {"checkpoint": str(checkpoint), "renamed": conversion.renamed, "ignored": conversion.ignored}
    (out / "conversion.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    return conversion


def _check_fit(model, conversion, what):
    """Raises if a model is not made of the converted weights, each with its official name."""
    expected, weights = model.state_dict(), conversion.weights
    official = {ours: f" (`{name}`)" for name, ours in conversion.renamed.items()}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - weights.keys())]
    problems += [f"{name}{official.get(name, '')} is left over" for name in sorted(weights.keys() - expected.keys())]
    problems += [
        f"{name}{official.get(name, '')} is {tuple(value.shape)} instead of {tuple(expected[name].shape)}"
        for name, value in weights.items()
        if name in expected and value.shape != expected[name].shape
    ]
    if problems:
        raise ValueError(
            f"{what}: {'; '.join(problems[:5])} ({len(problems)} in all). Give the language model that it was trained "
            f"with, or convert the whole checkpoint."
        )
