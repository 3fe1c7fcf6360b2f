"""Apple's GPUs have no float64: nothing that a training step computes is one."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

from deem_plugin.feedback import DiffusionFeedbackCallback
from deem_plugin.vision import grids
from deem_plugin.vision.grids import sincos_positions

from .helpers import feedback_config, train
from .tiny_diffusion_models import DIFFUSION_MODELS, save_diffusion_model

# diffusers makes their rotary positions in float64 unless it finds an Apple GPU (or its backend), and then in float32.
OF_DIFFUSERS = {"flux-dev", "flux-schnell", "lumina2"}


class NoFloat64(TorchDispatchMode):
    """Stands for a device without float64: an operation that makes one is an error."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(isinstance(value, torch.Tensor) and value.dtype == torch.float64 for value in tree_iter(result)):
            raise TypeError(f"{func} makes a float64.")
        return result


class OnSuchADevice(DiffusionFeedbackCallback):
    """Takes the step, what the optimizer does and what is logged on such a device."""

    def on_step_begin(self, args, state, control, **kwargs):
        self.mode = NoFloat64()
        self.mode.__enter__()
        return super().on_step_begin(args, state, control, **kwargs)


def on_the_cpu(*args, **kwargs):
    """Positions are made on the CPU, wherever the rest is."""
    with _disable_current_modes():
        return sincos_positions(*args, **kwargs)


SETTINGS = {
    "queries": {},
    "pooled": {"condition": {"kind": "cls"}},
    "dense": {"condition": {"kind": "queries+dense"}},
    "contrastive": {"objective": {"kind": "contrastive"}},
    "anchored": {"anchor_weight": 1.0, "objective": {"timestep_sampling": "logit_normal", "draws_per_image": 2}},
}
CASES = [("sd1", name) for name in SETTINGS]
CASES += [
    pytest.param(name, "queries", marks=pytest.mark.slow)
    for name in DIFFUSION_MODELS
    if name != "sd1" and name not in OF_DIFFUSERS
]


@pytest.mark.parametrize(("diffusion_model", "settings"), CASES)
def test_no_step_makes_a_float64(tmp_path, monkeypatch, diffusion_model, settings):
    folder = save_diffusion_model(tmp_path / "model", diffusion_model)
    config = feedback_config(**{**SETTINGS[settings], "diffusion_model": {"path": str(folder)}})
    monkeypatch.setattr(grids, "sincos_positions", on_the_cpu)
    callback = OnSuchADevice(config)

    try:
        trainer, _ = train(tmp_path / "out", callback, max_grad_norm=1.0)
    finally:
        callback.mode.__exit__(None, None, None)

    assert any("feedback_loss" in entry for entry in trainer.state.log_history)
    with pytest.raises(TypeError, match="float64"), NoFloat64():
        torch.ones(1).double()
