"""A tiny VLM run with feedback whose noise depends on the picture alone, so that gradients can be compared."""

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from transformers import Trainer, TrainerCallback, TrainingArguments

from deem_plugin.feedback import (
    DiffusionFeedback,
    DiffusionFeedbackCallback,
    DiffusionModel,
    FeedbackConfig,
    PixelCodec,
    UNetDenoiser,
)
from deem_plugin.feedback.state import StepState
from deem_plugin.settings import build_settings, merge_settings
from deem_plugin.vision.views import View

from ..tiny import IMAGE_SIZE, tiny_llava

CONTEXT_DIM = 16
CONFIG = {
    "diffusion_model": {"path": "not-read"},
    "condition": {"num_queries": 4, "resampler_dim": 16, "resampler_heads": 2},
    "weight": 50.0,
}


def feedback_config(**settings):
    """The small feedback's settings with others laid over them, nested as in a recipe."""
    nested = merge_settings(FeedbackConfig, CONFIG, settings)
    return build_settings(FeedbackConfig, nested, "feedback", "a test", strict=False)


class KeyedFeedback(DiffusionFeedback):
    """Draws noise and timesteps as functions of the picture, whatever the batch it comes in."""

    def __call__(self, latents, context, *, generator=None, **options):
        noise = torch.stack(
            [
                torch.randn(x.shape, generator=torch.Generator().manual_seed(int(x.double().abs().sum() * 1e4)))
                for x in latents
            ]
        )
        timesteps = (latents.double().abs().flatten(1).sum(1) * 1e3).long() % 1000
        return super().__call__(latents, context, timesteps=timesteps, noise=noise, **options)


def pixel_diffusion_model(context_dim=CONTEXT_DIM, prediction_type="epsilon"):
    """A pixel-space diffusion model of Stable Diffusion's UNet class; its codec draws nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=IMAGE_SIZE,
            in_channels=3,
            out_channels=3,
            block_out_channels=(4, 8),
            norm_num_groups=2,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=context_dim,
            attention_head_dim=2,
        )
    return DiffusionModel(UNetDenoiser(unet, DDPMScheduler(prediction_type=prediction_type)), PixelCodec())


class LoudCallback(DiffusionFeedbackCallback):
    """Starts with a strong conditioner, so that the feedback's share of the gradients is worth comparing."""

    def attach(self, model, processing_class=None, **options):
        attached = self.hook is not None
        super().attach(model, processing_class, **options)
        if not attached:
            torch.nn.init.normal_(self.conditioner.head.weight, generator=torch.Generator().manual_seed(1))


def keyed_callback(**settings):
    """The callback under test, on the pixel diffusion model with keyed noise."""
    diffusion_model = pixel_diffusion_model()
    return LoudCallback(feedback_config(**settings), diffusion_model, KeyedFeedback(diffusion_model.denoiser))


def samples(processor, count=4, with_images=True):
    """Samples of equal length: a picture of noise, sixteen image tokens, a few words, labels on the words."""
    generator = torch.Generator().manual_seed(0)
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    rows = []
    for _ in range(count):
        words = torch.randint(5, 100, (6,), generator=generator)
        prefix = torch.full((16,), image_token) if with_images else torch.full((16,), 7)
        row = {
            "input_ids": torch.cat([prefix, words]),
            "attention_mask": torch.ones(22, dtype=torch.long),
            "labels": torch.cat([torch.full((16,), -100), words]),
        }
        if with_images:
            row["pixel_values"] = (torch.rand(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) - mean) / std
        rows.append(row)
    return rows


def views_of(tokens, pictures=None, pooled=None, maps=None):
    """One view for each picture, an image of its own."""
    pictures = torch.rand(len(tokens), 3, 8, 8) if pictures is None else pictures
    return [
        View(
            own,
            pictures[index],
            index,
            pooled=None if pooled is None else pooled[index],
            maps=None if maps is None else {name: level[index] for name, level in maps.items()},
        )
        for index, own in enumerate(tokens)
    ]


def begin_step(callback, scale=1.0, seed=0):
    """Starts an optimizer step, as the Trainer's events do."""
    callback.hook.state = StepState(scale, seed)


def mean_loss(callback):
    """The mean per image of the feedback since the last call; None without an image."""
    sums = callback.hook.sums.take(("loss", "images"), "cpu")
    return sums["loss"] / sums["images"] if sums["images"] else None


def total_loss(callback, views):
    """The sum over the images of the mean over their views, with its graph, as the callback computes it."""
    return callback.hook.loss(views, callback.conditioner, torch.Generator().manual_seed(0)).total


def collate(rows):
    """Stacks samples."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class GradientProbe(TrainerCallback):
    """Keeps the gradients of every optimizer step, as the optimizer sees them."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def arguments(folder, **settings):
    """Training arguments for one or a few steps on the CPU, without clipping, shuffling or saving."""
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 4,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**defaults, **settings})


def train(folder, callback=None, model=None, rows=None, trainer_class=Trainer, eval_dataset=None, **settings):
    """Trains the tiny LLaVA and returns the trainer and the gradients of each step."""
    vlm, processor = tiny_llava()
    model = vlm if model is None else model
    probe = GradientProbe()
    trainer = trainer_class(
        model=model,
        args=arguments(folder, **settings),
        train_dataset=samples(processor) if rows is None else rows,
        eval_dataset=eval_dataset,
        data_collator=collate,
        processing_class=processor,
        callbacks=[probe, *([callback] if callback else [])],
    )
    trainer.train()
    return trainer, probe.steps


def relative_difference(first, second, contains=""):
    """Norm of the difference of two sets of gradients over the norm of the first; both must name the same ones."""
    names = [name for name in first if contains in name]
    assert names and set(first) == set(second)
    difference = sum((first[n] - second[n]).double().square().sum() for n in names).sqrt()
    return (difference / sum(first[n].double().square().sum() for n in names).sqrt()).item()


def losses_of_training(loss, parameters, steps, learning_rate):
    """Minimises `loss()` over `parameters` by Adam and returns its value before each step."""
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    losses = []
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses
