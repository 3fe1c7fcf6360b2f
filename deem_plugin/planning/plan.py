"""Says what a recipe takes, before a GPU is booked: parameters, FLOPs, memory, and what would make it fit."""

import copy
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer

from deem_plugin.feedback.config import DiffusionModelConfig, FeedbackConfig
from deem_plugin.planning.flops import DeemCounter, DenoiserCounter, StepCounter
from deem_plugin.planning.memory import (
    STRATEGIES,
    UTILISATION,
    Gpu,
    Memory,
    OptimizerStates,
    Weight,
    communication_memory,
    quantized_bytes,
    state_memory,
)
from deem_plugin.planning.skeleton import PICTURE_SIZE, Skeleton, build_skeleton
from deem_plugin.training.parts import LANGUAGE_MODEL, TOWER, count_parameters
from deem_plugin.training.recipes import Recipe, load_recipe

# Tokens of text beside the picture where neither the recipe nor the caller says how long a conversation is.
TEXT_TOKENS = 128

# Lets a recipe for GPUs be read where there is none.
ON_ANY_MACHINE = ("training.use_cpu=true", "training.tf32=null")


@dataclass
class Flops:
    """
    Floating-point operations of one micro-batch on one GPU; with `feedback.share` the mean over micro-batches.

    Args:
        without_feedback (`int`, *optional*): Of the model alone; None for an encoder that learns from feedback only.
        encoding (`int`): Of the pictures' latents, which the feedback needs.
        denoising (`int`): Of conditioner and denoiser, and of the backward pass through them; for an encoder alone
            also of the encoder. Of the interleaved model's two losses that ask the denoiser.
    """

    without_feedback: int | None
    encoding: int = 0
    denoising: int = 0

    @property
    def total(self) -> int:
        """With the feedback, if the recipe has it."""
        return (self.without_feedback or 0) + self.encoding + self.denoising


@dataclass
class Row:
    """Memory of one way to spread the run over GPUs; `refusal` says why the run would not start."""

    strategy: str
    gpus: int
    memory: Memory
    own: bool
    refusal: str | None = None


@dataclass
class Option:
    """What the recipe takes after a change, and all before it: its overrides, and the rows that it then has."""

    name: str
    overrides: list[str]
    rows: list[Row]


@dataclass
class Plan:
    """
    What a recipe takes.

    Args:
        recipe (`str`): Its name.
        pictures (`int`): Conversations of a micro-batch on one GPU, one picture each.
        accumulation (`int`): Micro-batches of a step.
        tokens (`int`): Length of a conversation, those of its picture among them; 0 for an encoder alone.
        image_tokens (`int`): Tokens of a picture.
        parameters (`dict[str, list[int]]`): Part to trainable and frozen parameters, the feedback's own too.
        flops (`Flops`): Of a micro-batch.
        rows (`list[Row]`): Memory for each strategy and number of GPUs.
        notes (`list[str]`): What had to be supposed.
        feedback (`str`): What `flops.denoising` is that of.
        mixed_precision (`bool`): Whether the run computes in bfloat16 or float16.
        picture_size (`tuple[int, int]`): Width and height of the pictures in pixels, where the model cares.
        options (`list[Option]`): Changes tried one after the other until a row fits; empty if nothing had to be tried.
    """

    recipe: str
    pictures: int
    accumulation: int
    tokens: int
    image_tokens: int
    parameters: dict[str, list[int]]
    flops: Flops
    rows: list[Row]
    notes: list[str]
    feedback: str
    mixed_precision: bool
    picture_size: tuple[int, int]
    options: list[Option] = field(default_factory=list)


def make_plan(
    recipe: Recipe,
    gpus: Sequence[int] = (1, 8),
    tokens: int | None = None,
    picture_size: tuple[int, int] = PICTURE_SIZE,
) -> Plan:
    """
    Plans a recipe on the meta device; nothing is downloaded but configs, and no weight is allocated.

    Args:
        recipe (`Recipe`): What would be trained.
        gpus (`Sequence[int]`): Numbers of GPUs to give the memory for.
        tokens (`int`, *optional*):
            Length of a conversation, those of its picture among them; by default `data.max_length`, the longest that
            the run can meet, and without one the picture's and 128. Of documents the length of a row.
        picture_size (`tuple[int, int]`): Width and height of the pictures in pixels, for models that tile them or
            read them at their own resolution.

    Raises:
        ValueError: If a config cannot be read, the optimizer is not known, or `tokens` does not hold the picture.
    """
    skeleton = _skeleton(recipe, picture_size)
    tokens = _conversation_length(recipe, skeleton, tokens)
    pictures, feedback = recipe.training.per_device_train_batch_size, _asks_diffusion_model(recipe)
    parameters = count_parameters(skeleton.model)
    for name, module in skeleton.frozen.items():
        parameters[name] = [0, sum(parameter.numel() for parameter in module.parameters())]
    measure = _MemoryRows(recipe, skeleton, picture_size)

    counter = _counter(recipe, skeleton)
    alone = counter.count_flops(pictures, tokens, feedback=False) if skeleton.image_tokens else None
    flops = Flops(alone)
    if feedback:
        encoding = counter.count_encoding(pictures)
        denoising = counter.count_flops(pictures, tokens, feedback=True) - (alone or 0) - encoding
        share = recipe.feedback.share if isinstance(recipe.feedback, FeedbackConfig) else 1.0
        flops.encoding, flops.denoising = round(share * encoding), round(share * denoising)
    return Plan(
        recipe=recipe.name,
        pictures=pictures,
        accumulation=recipe.training.gradient_accumulation_steps,
        tokens=tokens,
        image_tokens=skeleton.image_tokens,
        parameters=parameters,
        flops=flops,
        rows=measure(counter, gpus, tokens),
        notes=skeleton.notes,
        feedback=_feedback_name(recipe),
        mixed_precision=measure.mixed,
        picture_size=picture_size,
    )


def fit(plan: Plan, name: str | Path, overrides: Sequence[str], gpus: Sequence[int], limit: int):
    """
    Adds to a plan the changes that make it fit, each on top of those before, until some row does.

    Args:
        plan (`Plan`): Of the recipe as it is.
        name, overrides: The recipe's, as [`~deem_plugin.training.recipes.load_recipe`] takes them.
        gpus (`Sequence[int]`): Numbers of GPUs to choose from.
        limit (`int`): Memory of a GPU in bytes.
    """
    rows, tried = plan.rows, [*overrides, *ON_ANY_MACHINE]
    for option, change in OPTIONS.items():
        if least(rows).memory.total <= limit:
            return
        added = change(load_recipe(name, tried), plan.parameters)
        if added:
            tried += added
            rows = memory_rows(load_recipe(name, tried), gpus, plan)
            plan.options.append(Option(option, added, rows))


def step_seconds(plan: Plan, gpu: Gpu) -> float | None:
    """
    Estimates the seconds of an optimizer step on GPUs of a kind, from FLOPs and [`UTILISATION`]; None for a run in
    float32, whose products have other rates. Communication, data and the optimizer are not in it.
    """
    if not plan.mixed_precision:
        return None
    return plan.flops.total * plan.accumulation / (gpu.tflops * 1e12 * UTILISATION)


def least(rows: Sequence[Row]) -> Row:
    """Returns the row that takes the least memory of those that a run would not refuse."""
    return min((row for row in rows if row.refusal is None), key=lambda row: row.memory.total)


def memory_rows(recipe: Recipe, gpus: Sequence[int], plan: Plan) -> list[Row]:
    """Returns the memory of each strategy and number of GPUs, for conversations and pictures as a plan has them."""
    skeleton = _skeleton(recipe, plan.picture_size)
    measure = _MemoryRows(recipe, skeleton, plan.picture_size)
    return measure(_counter(recipe, skeleton), gpus, plan.tokens)


def _asks_diffusion_model(recipe: Recipe) -> bool:
    if recipe.deem is not None:
        return bool(recipe.deem.image_weight or recipe.deem.feedback_weight)
    return recipe.feedback is not None


def _feedback_name(recipe: Recipe) -> str:
    if recipe.deem is not None:
        return "the next image and the same image"
    return "conditioner and denoiser" if recipe.model.encoder is None else "encoder and denoiser"


def _held(recipe: Recipe) -> DiffusionModelConfig | None:
    """Returns how a feedback holds its frozen denoiser; None where none is held by such settings."""
    has_settings = isinstance(recipe.feedback, FeedbackConfig) and recipe.denoiser is None
    return recipe.feedback.diffusion_model if has_settings else None


def _counter(recipe: Recipe, skeleton: Skeleton) -> StepCounter:
    counter = StepCounter if recipe.deem is None else DeemCounter
    return (counter if recipe.denoiser is None else DenoiserCounter)(skeleton, _autocast_dtype(recipe))


def _smaller_denoiser(recipe: Recipe, parts: Collection[str]) -> list[str]:
    if recipe.deem is not None:
        return ["deem.dtype=bfloat16"] if recipe.deem.denoiser and recipe.deem.dtype == "float32" else []
    held = _held(recipe)
    return ["feedback.diffusion_model.dtype=bfloat16"] if held and held.dtype == "float32" else []


def _offload(recipe: Recipe, parts: Collection[str]) -> list[str]:
    held = _held(recipe)
    if held is None or recipe.feedback.condition.shows_maps:
        return []
    return [] if held.cpu_offload or held.quantization else ["feedback.diffusion_model.cpu_offload=true"]


def _checkpointing(recipe: Recipe, parts: Collection[str]) -> list[str]:
    return [] if recipe.training.activation_checkpointing else ["training.activation_checkpointing=true"]


def _smaller_batch(recipe: Recipe, parts: Collection[str]) -> list[str]:
    pictures, accumulation = recipe.training.per_device_train_batch_size, recipe.training.gradient_accumulation_steps
    settings = ["training.per_device_train_batch_size=1"]
    return [*settings, f"training.gradient_accumulation_steps={accumulation * pictures}"] if pictures > 1 else []


# How LLaVA's recipes name the parts that the marks stand for.
_LLAVA_NAMES = {LANGUAGE_MODEL: "language_model", TOWER: "vision_tower"}


def _lora(recipe: Recipe, parts: Collection[str]) -> list[str]:
    if recipe.model.lora.r or recipe.model.encoder or recipe.deem is not None:
        return []
    trained = [mark for mark in (LANGUAGE_MODEL, TOWER) if not {mark, _LLAVA_NAMES[mark]} & set(recipe.model.freeze)]
    projector = "multi_modal_projector"
    settings = {
        "dtype": "bfloat16",
        "lora.r": 16,
        "lora.modules": json.dumps(trained),
        "lora.full": f"[{projector}]" if projector in parts else "[]",
    }
    return [*(f"model.{key}={value}" for key, value in settings.items()), "training.fsdp=null"] if trained else []


# What can make a recipe fit, from what costs nothing to what changes the training.
OPTIONS = {
    "the denoiser in bfloat16": _smaller_denoiser,
    "the diffusion model on the CPU between feedbacks": _offload,
    "activation checkpointing (a forward pass more)": _checkpointing,
    "one conversation a micro-batch, accumulated": _smaller_batch,
    "LoRA on bfloat16 weights": _lora,
}


def optimizer_states(args) -> OptimizerStates:
    """
    Returns what the optimizer of `TrainingArguments` keeps of each trainable parameter.

    Raises:
        ValueError: If it is none whose states are known.
    """
    optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    if optimizer is torch.optim.AdamW:
        return OptimizerStates(per_element=2, per_tensor=4)
    if optimizer is torch.optim.SGD:
        return OptimizerStates(per_element=1 if settings.get("momentum") else 0, per_tensor=0)
    raise ValueError(
        f"It is not known what the optimizer `training.optim: {args.optim}` ({optimizer.__name__}) keeps. A plan "
        f"knows adamw_torch, adamw_torch_fused and sgd."
    )


def own_strategy(args) -> str:
    """Returns the strategy that `TrainingArguments` ask for."""
    if args.fsdp:
        return "fsdp2"
    if args.deepspeed:
        return "zero3" if args.hf_deepspeed_config.is_zero3() else "zero2"
    return "ddp"


def refusal(recipe: Recipe, strategy: str) -> str | None:
    """Returns why a run would refuse a strategy; None if it would not."""
    if strategy == "zero3" and recipe.feedback is not None:
        return "the feedback refuses ZeRO-3"
    if strategy == "fsdp2" and recipe.model.encoder:
        return "an encoder alone is not sharded"
    return None


class _MemoryRows:
    """Reads a skeleton's sizes before its tensors become fake, and then makes the rows of the memory table."""

    def __init__(self, recipe: Recipe, skeleton: Skeleton, picture_size: tuple[int, int]):
        self.recipe = recipe
        self.picture_size = picture_size
        self.mixed = _autocast_dtype(recipe) is not None
        self.weights = [
            Weight(tuple(parameter.shape), parameter.element_size(), parameter.requires_grad)
            for parameter in skeleton.model.parameters()
        ]
        self.diffusion_model = _frozen_bytes(recipe, skeleton)
        self.root, self.unit = _fsdp_units(skeleton.model)

    def __call__(self, counter: StepCounter, gpus: Sequence[int], tokens: int) -> list[Row]:
        arguments = (self.recipe.training.per_device_train_batch_size, tokens, _asks_diffusion_model(self.recipe))
        peaks = {False: counter.count_memory(*arguments)}
        if self.mixed and max(gpus) > 1:
            # Under DeepSpeed and FSDP modules compute with weights that are cast already, and so are the outputs.
            cast = replace(self.recipe, model=replace(self.recipe.model, dtype=_dtype_name(self.recipe)))
            peaks[True] = _counter(cast, _skeleton(cast, self.picture_size)).count_memory(*arguments)
        states = optimizer_states(self.recipe.training)
        rows = []
        for number in gpus:
            for strategy in STRATEGIES if number > 1 else STRATEGIES[:1]:
                memory = state_memory(self.weights, states, strategy, number, self.mixed)
                memory.diffusion_model = self.diffusion_model
                memory.activations = peaks[self.mixed and strategy != "ddp"]
                memory.communication = communication_memory(
                    self.weights, strategy, number, self.mixed, self.root, self.unit
                )
                own = number == 1 or strategy == own_strategy(self.recipe.training)
                rows.append(Row(strategy, number, memory, own, refusal(self.recipe, strategy)))
        return rows


def _skeleton(recipe: Recipe, picture_size: tuple[int, int]) -> Skeleton:
    skeleton = build_skeleton(copy.deepcopy(recipe), picture_size)
    if recipe.training.activation_checkpointing:
        skeleton.model.activation_checkpointing_enable(recipe.training.activation_checkpointing_kwargs)
    return skeleton


def _conversation_length(recipe: Recipe, skeleton: Skeleton, tokens: int | None) -> int:
    if not skeleton.image_tokens:
        return 0
    if tokens is None:
        tokens = recipe.data.max_length or skeleton.image_tokens + TEXT_TOKENS
    if tokens <= skeleton.image_tokens:
        raise ValueError(
            f"A conversation of {tokens} tokens does not hold its picture, which takes {skeleton.image_tokens}, and a "
            f"word. Set `--tokens`, or `data.max_length`, to more."
        )
    return tokens


def _dtype_name(recipe: Recipe) -> str:
    return "bfloat16" if recipe.training.bf16 else "float16"


def _autocast_dtype(recipe: Recipe) -> torch.dtype | None:
    args = recipe.training
    return getattr(torch, _dtype_name(recipe)) if args.bf16 or args.fp16 else None


def _frozen_bytes(recipe: Recipe, skeleton: Skeleton) -> int:
    """Returns what the frozen modules beside the model take between two feedbacks."""
    held, total = _held(recipe), 0
    for name, module in skeleton.frozen.items():
        if name == "anchor" or held is None or not held.cpu_offload:
            total += quantized_bytes(module, held.quantization if held and name == "denoiser" else None)
    return total


def _fsdp_units(model: nn.Module) -> tuple[int, int]:
    """Returns the elements outside FSDP's units, and those of the largest unit."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    units = [module for module in model.modules() if type(module).__name__ in names]
    inside = {id(parameter): parameter.numel() for module in units for parameter in module.parameters()}
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in units]
    return sum(p.numel() for p in model.parameters()) - sum(inside.values()), max(sizes, default=0)
