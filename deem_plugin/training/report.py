"""Looks whether the first steps train what is meant to train, and nothing else."""

import logging

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from deem_plugin.training.parts import count_parameters, parameter_table, part_of

logger = logging.getLogger(__name__)

# Values kept of each parameter to compare with: enough to see a change, little beside the parameter.
_SAMPLE = 256


class MovementCheck(TrainerCallback):
    """
    Reports trainable and frozen parameters by part, and checks the first optimizer step whose learning rate was above
    zero and in which the tower, a part of the model, saw an image: it must have changed if any of it is trainable, and
    nothing frozen may have.
    """

    def __init__(self, tower):
        self.tower = tower
        self._before: dict[str, torch.Tensor] | None = None
        self._ran = False
        self._rate = 0.0
        self._handle = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Logs the table and remembers a sample of every parameter."""
        if state.is_world_process_zero:
            logger.info("Parameters by part:\n%s", parameter_table(count_parameters(model)))
        self._before = {name: _sample(parameter) for name, parameter in model.named_parameters()}
        self._handle = self.tower.register_forward_hook(self._note)

    def _note(self, module, args, output):
        self._ran = True

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        """Remembers the learning rate of the step that is about to be made."""
        self._rate = max(group["lr"] for group in optimizer.param_groups)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Compares the parameters with those before the step."""
        skipped = getattr(optimizer, "step_was_skipped", False)  # fp16 skips steps until its loss scale fits
        if self._before is None or not self._ran or self._rate == 0.0 or skipped:
            self._ran = False
            return
        before, self._before = self._before, None
        self._handle.remove()
        tower = {id(parameter) for parameter in self.tower.parameters()}
        trainable, moved, strayed = False, False, []
        for name, parameter in model.named_parameters():
            changed = not torch.equal(before[name], _sample(parameter))
            if parameter.requires_grad and id(parameter) in tower:
                trainable, moved = True, moved or changed
            elif not parameter.requires_grad and changed:
                strayed.append(name)
        if strayed:
            raise RuntimeError(
                f"{len(strayed)} frozen parameters changed in the first optimizer step, first {strayed[0]!r} of "
                f"{part_of(strayed[0])}. Something writes into them outside the optimizer; look for code that changes "
                f"weights in the forward pass or in a callback."
            )
        if trainable and not moved:
            raise RuntimeError(
                f"The vision tower is meant to train, but did not move in the first optimizer step (learning rate "
                f"{self._rate:g}). Either no gradient reaches it (code that runs it under no_grad), or the step is "
                f"lost in the rounding of its weights ({next(self.tower.parameters()).dtype}): set "
                f"`model.dtype: float32` and `training.bf16: true`. To train without it, add it to `model.freeze`."
            )


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    """Returns up to `_SAMPLE` evenly spread values of a parameter, or of this rank's share of it, copied."""
    value = parameter.detach()
    value = (value.to_local() if isinstance(value, DTensor) else value).flatten()
    return value[:: max(1, value.numel() // _SAMPLE)].to("cpu", copy=True)
