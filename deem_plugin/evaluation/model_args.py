"""What `--model_args` may say to the model `deem`, checked before anything is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from deem_plugin.models.drawing import GUIDANCE, STEPS


@dataclass
class ModelArgs:
    """
    Arguments of the model `deem`.

    Args:
        pretrained (`str`): Checkpoint folder, hub id, or folder of a peft adapter.
        batch_size (`int` or `str`): Prompts answered at once. lmms-eval hands it over as text.
        device (`str`, *optional*): Device of this process; by default the one that accelerate gives it.
        dtype (`str`): `auto` (the checkpoint's), `float32`, `bfloat16` or `float16`.
        diffusion_model (`str`, *optional*):
            Folder or hub id of the diffusion model that the interleaved model draws with, for `image_dir` and for
            tasks that have a picture drawn before they ask (`generate_visual_cot`).
        image_dir (`str` or `Path`, *optional*):
            With it every prompt is answered by a picture, drawn to `TASK/DOCUMENT.png` in this folder, as
            text-to-image and editing tasks want it.
        steps, guidance (`int` and `float`): Of drawing, as in [`~deem_plugin.models.generate_images`].

    Raises:
        ValueError: If an argument is missing or has a value that it cannot have.
    """

    pretrained: str | None = None
    batch_size: int | str = 1
    device: str | None = None
    dtype: str = "auto"
    diffusion_model: str | None = None
    image_dir: str | Path | None = None
    steps: int = STEPS
    guidance: float = GUIDANCE

    def __post_init__(self):
        if self.pretrained is None:
            raise ValueError("The model `deem` needs a checkpoint: `--model_args pretrained=FOLDER_OR_HUB_ID`.")
        if not str(self.batch_size).isdecimal() or int(self.batch_size) < 1:
            raise ValueError(f"batch_size is {self.batch_size!r}; the model `deem` needs a whole number from 1 up.")
        if not isinstance(self.steps, int) or self.steps < 1 or not isinstance(self.guidance, int | float):
            raise ValueError(
                f"steps is {self.steps!r} and guidance is {self.guidance!r}; give a whole number from 1 up, and a "
                f"number."
            )
        if self.image_dir is not None and self.diffusion_model is None:
            raise ValueError(
                f"image_dir={self.image_dir} has every prompt answered by a picture, which needs "
                f"diffusion_model=FOLDER_OR_HUB_ID to draw with."
            )
        self.pretrained = str(self.pretrained)
        self.batch_size = int(self.batch_size)
        self.image_dir = None if self.image_dir is None else Path(self.image_dir).expanduser()


def read_model_args(given: Mapping[str, Any]) -> ModelArgs:
    """Makes `ModelArgs` of what lmms-eval hands over; raises a `ValueError` on names that there are none of."""
    known = [item.name for item in fields(ModelArgs)]
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"Unknown model arguments {unknown}; choose from {', '.join(known)}.")
    return ModelArgs(**given)
