"""What makes a frozen diffusion model cheaper, in time or in memory, by the settings of a feedback."""

import torch


def apply_optimizations(diffusion_model, config):
    """
    Applies the settings that change how a diffusion model computes; precision and quantization are chosen as it is
    loaded.

    Args:
        diffusion_model (`DiffusionModel`): Changed in place.
        config (`DiffusionModelConfig`): Its `gradient_checkpointing`, `channels_last`, `compile`, `cpu_offload`.
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
