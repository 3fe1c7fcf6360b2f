"""The conditioner's weights, kept beside a checkpoint and never in it."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..files import write_whole
from ..settings import build_settings
from .conditioner import Conditioner
from .config import FeedbackConfig, RossConfig
from .token_denoiser import TokenDenoiser

FILE_NAME = "feedback.safetensors"
# Key of the settings in the file's metadata -> their class, and that of the weights.
_KINDS = {"feedback": (FeedbackConfig, Conditioner), "ross": (RossConfig, TokenDenoiser)}


def save_conditioner(conditioner, config, folder, write=True, balance=None):
    """
    Writes `feedback.safetensors` into an existing folder: the weights of a [`Conditioner`] or [`TokenDenoiser`], its
    arguments, the feedback's settings and what a [`Balance`] has measured. All ranks must call, since sharded weights
    are gathered; one may `write`.
    """
    weights = {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu().contiguous()
        for name, value in conditioner.state_dict().items()
    }
    if not write:
        return
    metadata = {
        "format": "pt",
        "conditioner": json.dumps(conditioner.arguments),
        "ross" if isinstance(config, RossConfig) else "feedback": json.dumps(asdict(config)),
    }
    if balance is not None:
        metadata["balance"] = json.dumps([balance.text, balance.feedback])
    write_whole(Path(folder) / FILE_NAME, save(weights, metadata=metadata))


def load_conditioner(folder):
    """
    Reads `feedback.safetensors` from `folder`: a [`Conditioner`] and the [`FeedbackConfig`] that it was trained with,
    of ROSS a [`TokenDenoiser`] and a [`RossConfig`]. What is built is no larger than the file.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged, or asks for another conditioner than it has the weights of.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"No {FILE_NAME} in {folder}. It is written beside every checkpoint of a run with feedback; a run without "
            f"feedback has none."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}
        name = next((name for name in _KINDS if name in metadata), None)
        if name is None:
            raise ValueError(f"it says of none of {', '.join(_KINDS)}")
        settings_class, conditioner_class = _KINDS[name]
        arguments, settings = json.loads(metadata["conditioner"]), json.loads(metadata[name])
        if not isinstance(arguments, dict) or not isinstance(settings, dict):
            raise ValueError("what it says of itself are no objects of JSON")
        conditioner = _build(conditioner_class, arguments, weights)
        return conditioner, build_settings(settings_class, settings, name, FILE_NAME)
    except Exception as error:  # whatever a file may say, and whatever torch says of it
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:300]}): it is damaged, or "
            f"is no file that a run with feedback has written. Fetch it again, or move it out of the folder."
        ) from error


def _build(conditioner_class, arguments, weights):
    """Makes a conditioner and fills it; what `arguments` ask to build must be what the file has the weights of."""
    if _most_layers(arguments) > len(weights):
        raise ValueError(f"it asks for {_most_layers(arguments)} layers, and has {len(weights)} weights")
    with torch.device("meta"):  # takes no memory, whatever is asked for
        asked = conditioner_class(**arguments).state_dict()
    for name in asked.keys() | weights.keys():
        given, wanted = (tuple(each[name].shape) if name in each else None for each in (weights, asked))
        if given != wanted:
            raise ValueError(f"it asks for {name} of shape {wanted}, and has {given}")
    conditioner = conditioner_class(**arguments)
    conditioner.load_state_dict(weights)
    return conditioner


def _most_layers(value, key=""):
    """Returns the largest number of layers in arguments, at any depth."""
    if isinstance(value, dict):
        return max((_most_layers(inner, name) for name, inner in value.items()), default=0)
    if isinstance(value, list):
        return max((_most_layers(inner, key) for inner in value), default=0)
    return value if "layers" in key else 0


def read_balance(folder) -> tuple[float, float]:
    """Returns the norms that a [`Balance`] left in a folder's `feedback.safetensors`; zeros where there was none."""
    with safe_open(Path(folder) / FILE_NAME, framework="pt") as file:
        return tuple(json.loads((file.metadata() or {}).get("balance", "[0.0, 0.0]")))


def read_conditioner(folder, conditioner):
    """
    Returns the weights in a folder's `feedback.safetensors`, for a conditioner of the same kind.

    Raises:
        FileNotFoundError: If the folder holds no such file.
        ValueError: If they are of a conditioner that was made with other settings.
    """
    loaded, _ = load_conditioner(folder)
    if type(loaded) is not type(conditioner) or loaded.arguments != conditioner.arguments:
        raise ValueError(
            f"The conditioner in {folder} was made with {loaded.arguments}, this run's with {conditioner.arguments}. "
            f"Use the settings of the first run; or, to start with a new conditioner, move the file {FILE_NAME} out "
            f"of that folder."
        )
    return loaded.state_dict()


def load_by_class(model, folder):
    """
    Loads a checkpoint's weights by the model's own `from_pretrained`; what a save leaves out stays as it is.

    A Trainer loads them by name and only warns about names that do not match. LLaVA and its kin are stored under other
    names than they have in memory, so that none would match (seen with transformers 5.24).

    Raises:
        ValueError: If they are of another model.
    """
    if not isinstance(model, PreTrainedModel):
        return
    stored = type(model).from_pretrained(folder, dtype=model.dtype).state_dict()
    missing, unexpected = model.load_state_dict(stored, strict=False)
    missing = sorted(set(missing) - set(model._keys_to_ignore_on_save or ()))
    if missing or unexpected:
        raise ValueError(
            f"The checkpoint {folder} is not of this model: missing {missing[:3]}, unexpected {unexpected[:3]}. "
            f"Use one that was written with these settings."
        )
