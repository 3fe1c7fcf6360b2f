"""The memory that a run takes on each GPU, by kind: arithmetic on the sizes of its tensors."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from torch import nn

GIB = 2**30


class Gpu(NamedTuple):
    """
    A GPU.

    Args:
        memory (`float`): That a program sees, in GiB; what the makers call 80 GB are 79 GiB.
        tflops (`float`): Matrix products in bfloat16 (T4 and V100: float16), without sparsity, by the maker's data
            sheet, in 10^12 operations a second.
    """

    memory: float
    tflops: float


GPUS = {
    "t4": Gpu(14.6, 65),
    "v100-16": Gpu(15.8, 125),
    "v100-32": Gpu(31.7, 125),
    "rtx3090": Gpu(23.7, 71),
    "rtx4090": Gpu(23.6, 165),
    "rtx5090": Gpu(31.4, 210),
    "a10": Gpu(22.1, 125),
    "l4": Gpu(22.0, 121),
    "a6000": Gpu(47.5, 155),
    "l40s": Gpu(44.4, 362),
    "a100-40": Gpu(39.4, 312),
    "a100-80": Gpu(79.2, 312),
    "h100": Gpu(79.1, 989),
    "h200": Gpu(139.8, 989),
    "b200": Gpu(178.3, 2250),
}

# Share of a GPU's matrix products that a training reaches; Llama 3 reports 38 to 43 % (https://arxiv.org/abs/2407.21783,
# Table 4). A guess for what is planned here, and smaller where batches are.
UTILISATION = 0.4

# What a process takes before its first tensor (CUDA context, NCCL, libraries), and what the allocator cannot use.
CONTEXT = 1 * GIB

STRATEGIES = ("ddp", "zero2", "zero3", "fsdp2")

# DeepSpeed's default sizes of the buckets that gradients are reduced in and weights are gathered in, in elements.
ZERO_BUCKET = 500_000_000
# Weights of one scale in bitsandbytes' 4-bit kinds.
_BNB_BLOCK = 64


class Weight(NamedTuple):
    """
    A parameter.

    Args:
        shape (`tuple[int, ...]`): Its shape.
        itemsize (`int`): Bytes of an element.
        trainable (`bool`): Whether it gets gradients and optimizer states.
    """

    shape: tuple[int, ...]
    itemsize: int
    trainable: bool

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class OptimizerStates:
    """
    What an optimizer keeps of each trainable parameter.

    Args:
        per_element (`int`): Tensors of the parameter's shape and precision: 2 for AdamW.
        per_tensor (`int`): Further bytes: 4 for AdamW's count of steps.
    """

    per_element: int
    per_tensor: int


@dataclass
class Memory:
    """
    Bytes on one GPU, by kind. The first four are exact, the last three are estimates.

    Args:
        weights (`int`): Parameters of the model.
        gradients (`int`): Their gradients.
        optimizer (`int`): States of the optimizer and, under DeepSpeed, the float32 weights that it updates.
        diffusion_model (`int`): The frozen denoiser and autoencoder, and an anchor's tower, whole on each GPU.
        activations (`int`): Most that a micro-batch holds beside them.
        communication (`int`): Buckets of gradients, and gathered weights.
        context (`int`): See `CONTEXT`.
    """

    weights: int
    gradients: int
    optimizer: int
    diffusion_model: int = 0
    activations: int = 0
    communication: int = 0
    context: int = CONTEXT

    @property
    def total(self) -> int:
        """Sum over all kinds."""
        return sum(asdict(self).values())


def state_memory(
    weights: Sequence[Weight], states: OptimizerStates, strategy: str, gpus: int, mixed_precision: bool
) -> Memory:
    """
    Returns weights, gradients and optimizer of rank 0, the fullest, between two optimizer steps.

    Args:
        weights (`Sequence[Weight]`): All parameters, as they are without any wrapper.
        states (`OptimizerStates`): Of the optimizer.
        strategy (`str`): `ddp` (each GPU holds everything), `zero2` and `zero3` (DeepSpeed,
            https://arxiv.org/abs/1910.02054: gradients and optimizer are shared out; with 3 also weights), or `fsdp2`
            (each tensor is cut along its first dimension).
        gpus (`int`): Number of GPUs.
        mixed_precision (`bool`): Whether the run computes in bfloat16 or float16.
    """
    trainable = [weight for weight in weights if weight.trainable]
    if strategy == "ddp":
        kept = sum(weight.numel * weight.itemsize for weight in trainable)
        frozen = sum(weight.numel * weight.itemsize for weight in weights if not weight.trainable)
        return Memory(kept + frozen, kept, states.per_element * kept + states.per_tensor * len(trainable))
    if strategy == "fsdp2":
        # accelerate holds what trains in float32 when the run computes in less.
        sizes = [4 if weight.trainable and mixed_precision else weight.itemsize for weight in weights]
        shards = [_rows_of_rank_0(weight.shape, gpus) * size for weight, size in zip(weights, sizes, strict=True)]
        kept = sum(shard for weight, shard in zip(weights, shards, strict=True) if weight.trainable)
        return Memory(sum(shards), kept, states.per_element * kept + states.per_tensor * len(trainable))
    # DeepSpeed casts the whole model and updates flat float32 copies of what trains.
    cast = [2 if mixed_precision else weight.itemsize for weight in weights]
    whole = sum(weight.numel * size for weight, size in zip(weights, cast, strict=True))
    share = _ceil(sum(weight.numel for weight in trainable), gpus)
    return Memory(
        weights=whole if strategy == "zero2" else _ceil(whole, gpus),
        gradients=share * (2 if mixed_precision else 4),
        optimizer=share * 4 * (1 + states.per_element) + states.per_tensor,
    )


def communication_memory(
    weights: Sequence[Weight], strategy: str, gpus: int, mixed_precision: bool, root: int, unit: int
) -> int:
    """
    Estimates what moving gradients and weights between GPUs takes, in bytes.

    Args:
        weights, strategy, gpus, mixed_precision: As in [`state_memory`].
        root (`int`): Elements outside the units that FSDP gathers one by one; they stay gathered for the whole step.
        unit (`int`): Elements of the largest unit, a layer of the language model.
    """
    if gpus == 1:
        return 0
    trained = sum(weight.numel for weight in weights if weight.trainable)
    size = 2 if mixed_precision else 4
    if strategy == "ddp":  # its buckets are a second copy of the gradients
        return sum(weight.numel * weight.itemsize for weight in weights if weight.trainable)
    if strategy == "fsdp2":  # the unit in use, the one fetched ahead, and the gradients of one and of the root
        return size * (2 * root + 3 * unit)
    buckets = 2 if strategy == "zero2" else 3
    return buckets * min(trained, ZERO_BUCKET) * size


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


def find_gpu(name: str) -> Gpu:
    """Returns a GPU by name; raises a `ValueError` that lists the known ones."""
    if name.lower() not in GPUS:
        raise ValueError(
            f"Unknown GPU {name!r}. Known: {', '.join(GPUS)}. Give one of them, or the memory itself with "
            f"`--gpu-memory GIB`."
        )
    return GPUS[name.lower()]


def _rows_of_rank_0(shape: tuple[int, ...], gpus: int) -> int:
    """Returns the elements of the largest of `gpus` pieces along the first dimension."""
    return _ceil(shape[0], gpus) * math.prod(shape[1:]) if shape else 1


def _ceil(value: int, parts: int) -> int:
    return -(-value // parts)
