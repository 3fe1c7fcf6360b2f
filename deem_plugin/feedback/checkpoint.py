"""The conditioner's weights, kept beside a checkpoint and never in it."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from .conditioner import Conditioner
from .token_denoiser import TokenDenoiser

FILE_NAME = "feedback.safetensors"


def save_conditioner(conditioner, config, folder, write=True):
    """
    Writes `feedback.safetensors` into `folder`: the conditioner's weights, its arguments and the feedback's settings.

    Args:
        conditioner (`Conditioner`): What to write.
        config (`FeedbackConfig`): Kept as metadata.
        folder (`str` or `Path`): An existing folder.
        write (`bool`): Whether this process writes. All ranks must call, since sharded weights are gathered here.
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
        "feedback": json.dumps(asdict(config)),
    }
    path = Path(folder) / FILE_NAME
    partial = path.with_suffix(".partial")
    save_file(weights, partial, metadata=metadata)
    os.replace(partial, path)


def load_conditioner(folder):
    """
    Reads `feedback.safetensors` from `folder`.

    Returns:
        `tuple[Conditioner, dict]`: The conditioner (with `source: llm` a [`TokenDenoiser`]), and the feedback's
        settings as it was trained.

    Raises:
        FileNotFoundError: If the folder holds no such file.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"No {FILE_NAME} in {folder}. It is written beside every checkpoint of a run with feedback; a run without "
            f"feedback has none."
        )
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys()}
    settings = json.loads(metadata["feedback"])
    kind = TokenDenoiser if settings.get("source") == "llm" else Conditioner
    conditioner = kind(**json.loads(metadata["conditioner"]))
    conditioner.load_state_dict(weights)
    return conditioner, settings
