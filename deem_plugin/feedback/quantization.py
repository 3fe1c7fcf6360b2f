"""Frozen weights in 8 or 4 bits, through the packages that diffusers knows."""

from importlib.util import find_spec

import torch
from torch import nn

# Name in a recipe to the package that it needs.
QUANTIZATIONS = {"torchao_int8": "torchao", "bnb_8bit": "bitsandbytes", "bnb_4bit": "bitsandbytes"}

# Weights of one scale in bitsandbytes' 4-bit kinds.
_BNB_BLOCK = 64


def quantization_config(name, dtype):
    """
    Returns diffusers' config of a quantization: the weights of linear layers alone, whose products are computed in
    `dtype`. Convolutions and norms stay in `dtype`.

    Args:
        name (`str`): One of `QUANTIZATIONS`.
        dtype (`torch.dtype`): Precision of all else.

    Raises:
        ValueError: If the package is missing, or it needs a GPU and there is none.
    """
    package = QUANTIZATIONS[name]
    if find_spec(package) is None:
        raise ValueError(
            f"`quantization: {name}` needs the package {package}, which is not installed. Install it by `pip install "
            f'"deem-plugin[quantized]"`, or leave `quantization` out.'
        )
    from diffusers import BitsAndBytesConfig, TorchAoConfig

    if package == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if not torch.cuda.is_available():
        raise ValueError(
            f"`quantization: {name}` quantizes on a GPU, and there is none. Set `quantization: torchao_int8`, which "
            f"works on a CPU too, or leave `quantization` out."
        )
    if name == "bnb_8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def quantized_bytes(model, name):
    """
    Returns the bytes of a network's parameters, without quantizing it.

    Args:
        model (`nn.Module`): In the precision that it is loaded in; it may be on the meta device.
        name (`str`, *optional*): One of `QUANTIZATIONS`, or None for the weights as they are.
    """
    total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if name is None:
        return total
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight
            total -= weight.numel() * weight.element_size()
            total += _linear_bytes(weight, name)
    return total


def _linear_bytes(weight, name):
    if name == "bnb_4bit":
        return -(-weight.numel() // 2) + 4 * -(-weight.numel() // _BNB_BLOCK)
    # A byte each, and for each row a scale in float32; torchao adds a zero point.
    return weight.numel() + len(weight) * (5 if name == "torchao_int8" else 4)
