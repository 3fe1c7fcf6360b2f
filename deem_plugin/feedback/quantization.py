"""Frozen weights in 8 or 4 bits, through the packages that diffusers knows."""

from importlib.util import find_spec

import torch

# Name in a recipe to the package that it needs.
QUANTIZATIONS = {"torchao_int8": "torchao", "bnb_8bit": "bitsandbytes", "bnb_4bit": "bitsandbytes"}


def quantization_config(name, dtype):
    """
    Returns diffusers' config of one of `QUANTIZATIONS`: the weights of linear layers alone, whose products are
    computed in `dtype`. Convolutions and norms stay in `dtype`.

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
