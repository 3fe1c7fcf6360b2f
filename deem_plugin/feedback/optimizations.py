"""What makes a frozen diffusion model cheaper, in time or in memory, by the settings of a feedback."""

from contextlib import contextmanager
from itertools import chain

import torch


def apply_optimizations(diffusion_model, config):
    """
    Applies, in place, the settings that change how a diffusion model computes: `gradient_checkpointing`,
    `channels_last`, `compile` and `cpu_offload` of a `DiffusionModelConfig`. Precision and quantization are chosen as
    it is loaded.
    """
    denoiser = diffusion_model.denoiser.model
    if config.gradient_checkpointing:
        # Networks of diffusers recompute whenever gradients flow, in eval mode too.
        denoiser.enable_gradient_checkpointing()
    if config.channels_last:
        for module in diffusion_model.modules():
            module.to(memory_format=torch.channels_last)
    if config.compile:
        _compile(denoiser)
    diffusion_model.cpu_offload = config.cpu_offload


def _compile(network):
    """
    Compiles a network in place, so that it keeps its class and the names of its parameters.

    The repeated blocks alone where diffusers says which they are: they hold most of what can be fused, and the whole
    takes several times as long to compile.
    """
    if network._repeated_blocks:
        network.compile_repeated_blocks()
    else:
        network.compile()


@contextmanager
def onloaded(modules, device):
    """
    A context in which frozen modules, which lie on the CPU, compute on `device`, with copies of their parameters and
    buffers; nothing is copied back.

    The offloading hooks of accelerate and diffusers take weights away after each forward pass, and the gradient of the
    context passes through them afterwards. Here forward and backward are both within the context.
    """
    tensors = [tensor for module in modules for tensor in chain(module.parameters(), module.buffers())]
    homes = [tensor.data for tensor in tensors]
    for tensor, home in zip(tensors, homes, strict=True):
        tensor.data = home.to(device, non_blocking=True, copy=True)
    try:
        yield
    finally:
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.data = home


def pin(modules):
    """Moves the weights of modules to page-locked memory, from which a GPU copies some times faster."""
    for tensor in chain.from_iterable(chain(module.parameters(), module.buffers()) for module in modules):
        tensor.data = tensor.data.pin_memory()
