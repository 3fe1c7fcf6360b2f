"""Tensors within what a model returns: a tensor, a tuple, or an output of transformers, nested at will."""

import torch
from torch._subclasses.fake_tensor import FakeTensor


def has_values(tensor):
    """Tells whether a tensor holds values; those of a plan (`deem plan`) are fake."""
    return not isinstance(tensor, FakeTensor)


def mapped(output, function, path=()):
    """Applies `(path, tensor) -> tensor` to each tensor within an output; containers of transformers in place."""
    if isinstance(output, torch.Tensor):
        return function(path, output)
    if isinstance(output, dict):
        for key in list(output.keys()):
            output[key] = mapped(output[key], function, (*path, key))
        return output
    if isinstance(output, list | tuple):
        return type(output)(mapped(value, function, (*path, index)) for index, value in enumerate(output))
    return output


def at_path(output, path):
    if isinstance(output, dict) and path in output:
        return output[path]
    for key in path:
        output = output[key]
    return output


def replaced(output, path, function):
    """Returns an output in which the tensor at `path` is replaced by `function` of it."""
    if not path:
        return function(output)
    key, rest = path[0], path[1:]
    if isinstance(output, tuple):
        return tuple(replaced(value, rest, function) if index == key else value for index, value in enumerate(output))
    output[key] = replaced(output[key], rest, function)
    return output


def field_of(output, name):
    """Returns a field of a tower's output, or of its tensors by path; None without one."""
    if isinstance(output, dict) and (name,) in output:
        return output[(name,)]
    return getattr(output, name, None)


def tokens_last(tensor):
    """Returns tokens `(..., tokens, dim)` of what may be a map `(images, dim, height, width)`."""
    return tensor.flatten(2).transpose(1, 2) if tensor.dim() == 4 else tensor


def tensors_of(values) -> list[torch.Tensor]:
    """Returns all tensors within an output."""
    tensors = []
    mapped(values, lambda path, tensor: tensors.append(tensor) or tensor)
    return tensors


def count_tokens(values) -> int:
    """Returns the number of tokens within an output."""
    return sum(tensor.numel() // tensor.shape[-1] for tensor in tensors_of(values) if tensor.dim() > 1)
