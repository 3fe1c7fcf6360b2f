"""Frozen weights that are kept on the CPU, and on a device only while they are needed."""

from contextlib import contextmanager
from itertools import chain


@contextmanager
def onloaded(modules, device):
    """
    A context in which modules compute on `device`; nothing is copied back, for frozen weights come back unchanged.

    The offloading hooks of accelerate and diffusers take weights away after each forward pass, and the gradient of the
    context passes through them afterwards. Here forward and backward are both within the context.

    Args:
        modules (`Iterable[nn.Module]`): Frozen, on the CPU.
        device (`torch.device`): Where copies of all parameters and buffers are made.
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
