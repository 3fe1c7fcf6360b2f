"""Counts what a training step computes and keeps, by running the real modules on tensors that hold no values."""

import os
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from inspect import signature

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from deem_plugin.feedback.state import StepState
from deem_plugin.planning.fakes import DEVICE
from deem_plugin.planning.skeleton import Skeleton
from deem_plugin.vision.towers import without_peft

TOKEN_TYPES = {"mm_token_type_ids", "token_type_ids"}


def flop_counter() -> FlopCounterMode:
    """Returns torch's counter of FLOPs with attention on a CPU, for which it has no formula."""
    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
        },
    )


def _attention_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(gradient, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


class MemoryTracker(TorchDispatchMode):
    """
    Follows the storages that are made while it is active; `peak` is the most bytes of them that lived at once.

    Args:
        existing (`Iterable[torch.Tensor]`): Tensors that are there already and do not count.
    """

    def __init__(self, existing: Iterable[torch.Tensor]):
        super().__init__()
        self._known = {_storage_key(tensor) for tensor in existing}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Runs the operation and follows what it returns, unless its inputs hold that already."""
        inputs = {_storage_key(value) for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor) and _storage_key(value) not in inputs | self._known:
                self._follow(value.untyped_storage())
        return result

    def _follow(self, storage):
        self._known.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, size: int):
        self._known.discard(key)
        self.live -= size


def _storage_key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class StepCounter:
    """
    Runs micro-batches of a skeleton on fake tensors. The skeleton is of no other use afterwards.

    Args:
        skeleton (`Skeleton`): The modules of the run.
        autocast_dtype (`torch.dtype`, *optional*): Precision in which the run computes, if not that of its weights.
    """

    def __init__(self, skeleton: Skeleton, autocast_dtype: torch.dtype | None = None):
        self.skeleton = skeleton
        self.autocast_dtype = autocast_dtype
        self.mode = skeleton.mode
        self._modules = [skeleton.model, *skeleton.frozen.values()]
        self._share = 1.0 if skeleton.hook is None else skeleton.hook.share

    def count_flops(self, pictures: int, tokens: int, feedback: bool) -> int:
        """
        Returns the floating-point operations of one micro-batch, forward and backward, recomputation included.

        Of all pictures, whatever share of them the feedback draws. Counted are matrix products, convolutions and
        attention.

        Args:
            pictures (`int`): Conversations of the micro-batch, each with one picture.
            tokens (`int`): Length of a conversation, those of its picture among them.
            feedback (`bool`): Whether the feedback is computed.
        """
        self._draw(1.0)
        with self.mode, flop_counter() as counter:
            self._step(pictures, tokens, feedback)
        return counter.get_total_flops()

    def count_memory(self, pictures: int, tokens: int, feedback: bool) -> int:
        """
        Returns the most bytes that the same micro-batch holds beside the model's and the diffusion model's weights and
        all gradients: what the backward pass needs, weights cast by autocast, and what comes and goes.
        """
        self._draw(self._share)
        weights = [parameter for module in self._modules for parameter in module.parameters()]
        with self.mode:
            for weight in weights:
                weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
            # Not together with the counter of FLOPs, whose hooks keep the outputs of all modules.
            with MemoryTracker([*weights, *(w.grad for w in weights if w.grad is not None)]) as tracker:
                self._step(pictures, tokens, feedback)
        return tracker.peak

    def _step(self, pictures: int, tokens: int, feedback: bool):
        hook = self.skeleton.hook
        self._switch(feedback)
        self.skeleton.model.train()
        inputs = self._inputs(pictures, tokens)
        with _no_value_checks(), self._autocast():
            loss = self._loss(inputs)
        loss.backward()
        if hook is not None:
            hook.check_injected()

    def _draw(self, share: float):
        """Has the feedback draw a share of the pictures."""
        if self.skeleton.hook is not None:
            self.skeleton.hook.share = share

    def _switch(self, feedback: bool):
        """Switches the feedback on or off."""
        if self.skeleton.hook is not None:
            # The offset at which a micro-batch draws the most pictures.
            self.skeleton.hook.state = StepState(1.0 if feedback else 0.0, offset=1 - 1e-6)

    def count_encoding(self, pictures: int) -> int:
        """Returns the FLOPs of encoding pictures to latents, a part of the feedback that never changes."""
        diffusion_model = self.skeleton.diffusion_model
        with self.mode, flop_counter() as counter:
            size = diffusion_model.image_size
            diffusion_model.codec.encode(torch.zeros(pictures, 3, size, size, device=DEVICE))
        return counter.get_total_flops()

    def _autocast(self):
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(DEVICE.type, self.autocast_dtype)

    def _inputs(self, pictures: int, tokens: int) -> dict[str, torch.Tensor]:
        inputs = {name: torch.cat([value] * pictures) for name, value in self.skeleton.picture.items()}
        if not self.skeleton.image_tokens:
            return inputs
        model = without_peft(self.skeleton.model)
        ids = torch.zeros(pictures, tokens, dtype=torch.long, device=DEVICE)
        ids[:, : self.skeleton.image_tokens] = model.config.image_token_id
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        # Told by the processors of families whose pictures have positions or attention of their own.
        for name in TOKEN_TYPES.intersection(signature(type(model).forward).parameters):
            inputs[name] = (ids == model.config.image_token_id).long()
        return inputs

    def _loss(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        outputs = self.skeleton.model(**inputs)
        # An encoder alone learns from the feedback only, see `training.trainer.EncoderTrainer`.
        return outputs.loss if self.skeleton.image_tokens else 0.0 * outputs.last_hidden_state.float().sum()


class DeemCounter(StepCounter):
    """Counts the interleaved model, whose feedback is the two losses that ask the diffusion model."""

    def __init__(self, skeleton: Skeleton, autocast_dtype: torch.dtype | None = None):
        super().__init__(skeleton, autocast_dtype)
        self._config = without_peft(skeleton.model).config
        self._weights = {name: getattr(self._config, name) for name in ("image_weight", "feedback_weight")}

    def _switch(self, feedback: bool):
        for name, weight in self._weights.items():
            setattr(self._config, name, weight if feedback else 0.0)

    def _inputs(self, pictures: int, tokens: int) -> dict[str, torch.Tensor]:
        inputs = {name: torch.cat([value] * pictures) for name, value in self.skeleton.picture.items()}
        # In the middle: the next image is told by what stands before it.
        first, count = (tokens - self.skeleton.image_tokens) // 2, self.skeleton.image_tokens
        ids = torch.zeros(pictures, tokens, dtype=torch.long, device=DEVICE)
        ids[:, first : first + count] = self._config.image_token_id
        ids[:, first] = self._config.image_start_token_id
        return inputs | {"input_ids": ids, "document_ids": torch.zeros_like(ids), "labels": ids.clone()}


class DenoiserCounter(StepCounter):
    """Counts the training of a denoiser on an encoder's tokens."""

    def _loss(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.skeleton.model(**inputs)["loss"]


@contextmanager
def _no_value_checks() -> Iterator[None]:
    """Switches off transformers' checks of values (as many image tokens as features): there are none to check."""
    name = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})
