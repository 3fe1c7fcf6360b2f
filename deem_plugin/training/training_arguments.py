"""The section `training` of a recipe."""

import math
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

# What a run needs at least 1 of.
_COUNTS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "save_total_limit",
)


@contextmanager
def naming_training():
    """Turns what transformers refuses of the settings into a `ValueError` that names their section of the recipe."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(f"The section `training` cannot be used: {error}") from error


@dataclass
class RecipeTrainingArguments(TrainingArguments):
    """
    All of `transformers.TrainingArguments`, and one more.

    Args:
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether the checkpoints that an earlier run has left in the output folder are deleted. Without it, a run
            that neither resumes nor overwrites them is refused.

    Raises:
        ValueError: On a value that no run can have.
    """

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Whether checkpoints of an earlier run in the output folder are deleted."}
    )

    def __post_init__(self):
        with naming_training():
            super().__post_init__()
        if self.do_eval or self.eval_on_start:
            raise ValueError("A recipe has no data for `training.eval_strategy`. Evaluate checkpoints by `deem eval`.")
        if not all(0 <= seed < 2**32 for seed in (self.seed, self.data_seed or 0)):
            raise ValueError(
                f"`training.seed` and `data_seed` must be from 0 to 2**32 - 1, got {self.seed}, {self.data_seed}."
            )
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"`training.{item.name}` must be a number from 0 up, got {value}.")
        for name in _COUNTS:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`training.{name}` must be at least 1, got {getattr(self, name)}.")
        if self.max_steps == 0 or (self.max_steps < 0 and self.num_train_epochs <= 0):
            raise ValueError(
                f"`training.max_steps` is {self.max_steps} and `training.num_train_epochs` {self.num_train_epochs}, "
                f"so nothing would train. Set one of them above 0."
            )
        if self.save_strategy == SaveStrategy.STEPS and self.save_steps <= 0:
            raise ValueError(
                f"`training.save_steps` must be above 0, got {self.save_steps}. For no checkpoints set "
                f"`training.save_strategy: 'no'`."
            )
        if self.dataloader_num_workers < 0:
            raise ValueError(
                f"`training.dataloader_num_workers` must be at least 0, got {self.dataloader_num_workers}."
            )
