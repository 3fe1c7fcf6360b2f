"""A training step of the 7B LoRA recipe with random weights: its time, what feedback adds, its memory as planned."""

import gc
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from transformers import Trainer, TrainerCallback

from benchmarks.feedback_setting import save_diffusion_model
from deem_plugin.training.recipes import Recipe, load_recipe

RECIPE = "llava-1.5-7b-feedback-lora"
# The first steps warm up kernels and allocator.
WARMUP_STEPS, STEPS = 2, 5


@dataclass(frozen=True)
class Shape:
    """
    Sizes of the model, and of a micro-batch.

    Args:
        text, vision (`dict`): Of `LlamaConfig` and `CLIPVisionConfig`.
        diffusion_model (`str`): One of the `CONFIGS` of `benchmarks.feedback_sizes`.
        tokens (`int`): Length of a conversation with its picture.
        batch (`int`): Conversations of a micro-batch.
        overrides (`tuple[str, ...]`): Of the recipe.
    """

    text: dict
    vision: dict
    diffusion_model: str
    tokens: int
    batch: int
    overrides: tuple[str, ...] = ()


def _text(width, inner, layers, heads, words) -> dict:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": words,
    }


def _vision(width, layers, heads, size, patch) -> dict:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": size,
        "patch_size": patch,
    }


SHAPES = {
    # LLaVA-1.5-7B and Stable Diffusion 2.1: 576 tokens of the picture and 128 of text.
    "7b": Shape(_text(4096, 11008, 32, 32, 32064), _vision(1024, 24, 16, 336, 14), "paper", 704, 4),
    "tiny": Shape(
        _text(32, 64, 2, 2, 64),
        _vision(32, 3, 2, 32, 8),
        "tiny",
        24,
        2,
        (
            *("training.use_cpu=true", "training.tf32=null", "training.bf16=false", "model.lora.r=2"),
            *("model.dtype=float32", "feedback.diffusion_model.dtype=float32"),
            *("feedback.condition.resampler_dim=32", "feedback.condition.resampler_heads=4"),
        ),
    ),
}
# Overrides of the recipe by the name of the step; `TAESD` stands for the folder of a tiny autoencoder.
VARIANTS = {
    "without feedback": ["feedback=null"],
    "with feedback": [],
    "a quarter of the pictures": ["feedback.share=0.25"],
    "tiny autoencoder": ["feedback.diffusion_model.autoencoder=TAESD"],
    "both": ["feedback.share=0.25", "feedback.diffusion_model.autoencoder=TAESD"],
}


def save_parts(name: str, folder: Path):
    """Writes the config of the VLM, and a diffusion model and a tiny autoencoder with new weights."""
    from diffusers import AutoencoderTiny

    _config(SHAPES[name]).save_pretrained(folder / "vlm")
    save_diffusion_model(SHAPES[name].diffusion_model, folder / "sd")
    options = {}
    if name == "tiny":
        channels = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
        options = {**channels, "num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}
    AutoencoderTiny(**options).save_pretrained(folder / "taesd")


def _config(shape: Shape):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    return LlavaConfig(
        text_config=LlamaConfig(**shape.text),
        vision_config=CLIPVisionConfig(**shape.vision),
        image_token_index=shape.text["vocab_size"] - 1,
    )


def _recipe(shape: Shape, folder: Path, variant: str) -> Recipe:
    settings = [
        f"model.model={folder / 'vlm'}",
        f"feedback.diffusion_model.path={folder / 'sd'}",
        "feedback.diffusion_model.cpu_offload=false",
        "feedback.image_mean=[0.5,0.5,0.5]",
        "feedback.image_std=[0.5,0.5,0.5]",
        f"training.output_dir={folder / 'out'}",
        f"training.per_device_train_batch_size={shape.batch}",
        f"training.max_steps={WARMUP_STEPS + STEPS}",
        *("training.gradient_accumulation_steps=1", 'training.save_strategy="no"', "training.report_to=none"),
        *("training.dataloader_num_workers=0", "training.warmup_steps=0", "training.disable_tqdm=true"),
    ]
    changes = [change.replace("TAESD", str(folder / "taesd")) for change in VARIANTS[variant]]
    if "feedback=null" in changes:
        settings = [setting for setting in settings if not setting.startswith("feedback.")]
    overrides = [o for o in shape.overrides if "feedback=null" not in changes or not o.startswith("feedback.")]
    return load_recipe(RECIPE, [*settings, *overrides, *changes])


class _Clock(TrainerCallback):
    """Seconds of each optimizer step, with all that the device does for it."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = _now(args.device)

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(_now(args.device) - self.started)


def _now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_step(name: str, variant: str, folder: Path) -> dict:
    """
    Times the training steps of one of `VARIANTS`.

    Args:
        name (`str`): One of `SHAPES`.
        variant (`str`): One of `VARIANTS`.
        folder (`Path`): What [`save_parts`] has written.

    Returns:
        `dict`: `seconds` (median of a step), `loss` (mean of all steps), and on a GPU `peak_bytes`, the most that
        tensors took.
    """
    from transformers import LlavaForConditionalGeneration

    from deem_plugin.feedback import DiffusionFeedbackCallback
    from deem_plugin.training.model import add_lora, freeze_unread_layers

    shape = SHAPES[name]
    recipe = _recipe(shape, folder, variant)
    device = recipe.training.device
    _release(device)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, recipe.model.dtype))
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(_config(shape))
    finally:
        torch.set_default_dtype(before)
    model = add_lora(model, recipe.model)
    freeze_unread_layers(model)
    clock, callbacks = _Clock(), []
    if recipe.feedback is not None:
        callbacks.append(DiffusionFeedbackCallback(recipe.feedback))
    rows = [_conversation(shape, generator) for _ in range(shape.batch * (WARMUP_STEPS + STEPS))]
    trainer = Trainer(model, replace(recipe.training), train_dataset=rows, callbacks=[*callbacks, clock])
    loss = trainer.train().training_loss
    result = {"seconds": median(clock.seconds[WARMUP_STEPS:]), "loss": loss}
    if device.type == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    del trainer, model, callbacks
    _release(device)
    return result


def _release(device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _conversation(shape: Shape, generator) -> dict:
    """Makes a conversation of random words about a picture of noise."""
    side, patch, words = shape.vision["image_size"], shape.vision["patch_size"], shape.text["vocab_size"]
    patches = (side // patch) ** 2
    text = torch.randint(3, words - 1, (shape.tokens - patches,), generator=generator)
    ids = torch.cat([text[:1], torch.full((patches,), words - 1), text[1:]])
    labels = ids.clone()
    labels[: patches + 1] = -100
    pixels = torch.randn(3, side, side, generator=generator).clamp(-1, 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}


def planned_bytes(name: str, variant: str, folder: Path) -> int:
    """Returns the memory that `deem plan` says the same run takes, without what a process takes before its tensors."""
    from deem_plugin.planning.plan import make_plan

    shape = SHAPES[name]
    [row] = make_plan(_recipe(shape, folder, variant), gpus=(1,), tokens=shape.tokens).rows
    return row.memory.total - row.memory.context
