"""What makes a frozen generator cheaper, in time or in memory, by the settings of a feedback."""

import torch


def economise(generator, config):
    """
    Applies the settings that change how a generator computes; precision and quantization are chosen as it is loaded.

    Args:
        generator (`DiffusionModel`): Changed in place.
        config (`DiffusionModelConfig`): Its `gradient_checkpointing`, `channels_last`, `compile`, `cpu_offload`.
    """
    denoiser = generator.denoiser.model
    if config.gradient_checkpointing:
        # Networks of diffusers recompute whenever gradients flow, in eval mode too.
        denoiser.enable_gradient_checkpointing()
    if config.channels_last:
        for module in generator.modules():
            module.to(memory_format=torch.channels_last)
    if config.compile:
        _compile(denoiser)
    generator.cpu_offload = config.cpu_offload


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
