"""Modules of tensors without values, in which a run is computed without memory for its weights."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_iter

# Fake tensors stand for those of a CPU: its kernels need no driver, and its attention keeps what a GPU's keeps.
DEVICE = torch.device("cpu")
_INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


class FakeWeightsMode(FakeTensorMode):
    """
    Computes with fake tensors what depends on weights, and with values what does not: the grids of pictures, token
    ids and masks, which models read while they run.
    """

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        # Whether an operation on fake tensors is being taken apart: all that it consists of is fake.
        self._within = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Runs the operation on values if none of its inputs is fake."""
        kwargs = kwargs or {}
        if not self._within and not any(_is_fake(value) for value in tree_iter((args, kwargs))):
            return func(*args, **kwargs)
        if func in _INDEXING:
            args = (args[0], _without_masks(args[1]), *args[2:])
        within, self._within = self._within, True
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._within = within


def _is_fake(value) -> bool:
    return isinstance(value, FakeTensor) or (isinstance(value, torch.Tensor) and value.is_meta)


def _without_masks(indices):
    """Replaces masks with values by the places where they are true: of a mask, a fake tensor's size is not known."""
    places = []
    for index in indices:
        known = isinstance(index, torch.Tensor) and not _is_fake(index)
        places += index.nonzero(as_tuple=True) if known and index.dtype == torch.bool else [index]
    return places


def put_fakes(module: nn.Module, mode: FakeTensorMode):
    """Replaces parameters, and buffers on the meta device, by fake ones on `DEVICE`; tied ones stay tied."""
    replaced: dict[int, nn.Parameter] = {}
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and not isinstance(parameter, FakeTensor):
                if id(parameter) not in replaced:
                    fake = FakeTensor(mode, parameter.detach().to("meta"), DEVICE)
                    replaced[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
                child._parameters[name] = replaced[id(parameter)]
        for name, buffer in child._buffers.items():
            if buffer is not None and buffer.is_meta:
                child._buffers[name] = FakeTensor(mode, buffer, DEVICE)
