"""Trains a denoiser of one's own on the tokens of a frozen encoder: `deem train-denoiser`."""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerCallback

from deem_plugin.feedback.callback import step_seed
from deem_plugin.feedback.checkpoint import save_conditioner
from deem_plugin.feedback.config import FeedbackConfig
from deem_plugin.feedback.diffusion_model import load_autoencoder
from deem_plugin.feedback.factory import make_conditioner, make_objective
from deem_plugin.feedback.from_scratch import make_diffusion_model, save_diffusion_model
from deem_plugin.feedback.latents import PixelCodec
from deem_plugin.feedback.loss import FeedbackLoss
from deem_plugin.settings import changed_settings
from deem_plugin.training.checkpoint import (
    FINAL_NAME,
    check_writable,
    resolve_resume,
    save_in_one_piece,
    train_and_keep,
)
from deem_plugin.training.recipes import Recipe, load_recipe
from deem_plugin.training.trainer import RecipeTrainer
from deem_plugin.vision.eyes import Eyes

logger = logging.getLogger(__name__)


class DenoiserTraining(nn.Module):
    """
    A denoiser and the conditioner that speaks to it, both new, on a frozen encoder, which is no module of this one.

    It makes visible what the encoder does not tell: the denoiser learns to restore pictures as well as the encoder's
    tokens allow, and in the next stage the encoder is asked to allow more (GenHancer's stage 1,
    https://arxiv.org/abs/2503.19480). `config` gives condition, timesteps and draws.
    """

    def __init__(self, eyes, conditioner, diffusion_model, config):
        super().__init__()
        # In a tuple, so that neither state dict nor optimizer nor DDP sees them.
        eyes.tower.requires_grad_(False).eval()
        loss = FeedbackLoss(
            diffusion_model, make_objective(config.objective, diffusion_model.denoiser), config.condition, eyes
        )
        self.frozen = (eyes, loss)
        self.conditioner = conditioner
        self.network = diffusion_model.denoiser.model
        self.seed = 0  # of the next micro-batch, set before each step

    def forward(self, pixel_values):
        """Returns `{"loss": the denoising error}` of pictures `(images, 3, height, width)`."""
        eyes, loss = self.frozen
        tower = eyes.tower
        if tower.device != pixel_values.device:
            tower.to(pixel_values.device)
        generator = torch.Generator(device=pixel_values.device).manual_seed(self.seed)
        self.seed += 1
        inputs = {eyes.layout.pixels: pixel_values.to(tower.dtype)}
        with torch.no_grad():
            views = eyes.views(inputs, tower(**inputs))
        losses = loss(views, self.conditioner, generator)
        return {"loss": losses.total / losses.images.clamp(min=1)}


class _StepSeeds(TrainerCallback):
    """Makes the noise a function of step and rank, so that a resumed run draws what it would have drawn."""

    def __init__(self, training):
        self.training = training

    def on_step_begin(self, args, state, control, **kwargs):
        self.training.seed = step_seed(args.seed, state.global_step, args.process_index)


def main(name: str, overrides: Sequence[str] = ()) -> str:
    """Trains the denoiser of the recipe `name`; what `deem train-denoiser` runs. Returns what to print."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    final = train_denoiser(load_recipe(name, overrides))
    return f"Saved {final}. Train with it: `feedback.diffusion_model.path={final} feedback.conditioner={final}`."


def train_denoiser(recipe: Recipe) -> Path:
    """
    Trains the denoiser of a recipe's section `denoiser`, and the conditioner, on images alone. Returns a folder in
    diffusers' layout with `feedback.safetensors` beside it, which appears only when it is complete.

    Raises:
        ValueError: If a section is missing or does not fit.
    """
    from transformers import set_seed

    from deem_plugin.data.image_collator import ImageCollator
    from deem_plugin.training.data import load_examples
    from deem_plugin.training.encoder import load_encoder

    args, config = recipe.training, recipe.feedback
    _check(recipe)
    check_writable(args.output_dir)
    resolve_resume(args)
    set_seed(args.seed)
    examples = load_examples(recipe)
    _, tower, image_processor = load_encoder(recipe.model, config.condition.reads_pooled)
    shape = recipe.denoiser
    codec = PixelCodec() if shape.autoencoder is None else load_autoencoder(shape.autoencoder).codec
    diffusion_model = make_diffusion_model(shape.network, shape.config, codec, shape.image_size)
    eyes = Eyes.of(tower, image_processor, config.image_mean, config.image_std)
    conditioner = make_conditioner(config.condition, eyes, diffusion_model.denoiser, seed=config.seed)
    trainer = RecipeTrainer(
        model=DenoiserTraining(eyes, conditioner, diffusion_model, config),
        args=args,
        train_dataset=examples,
        data_collator=ImageCollator(image_processor, recipe.data.crop_area),
    )
    trainer.add_callback(_StepSeeds(trainer.model))
    train_and_keep(trainer)
    final = Path(args.output_dir) / FINAL_NAME

    def save(folder: str):
        if args.should_save:
            os.makedirs(folder, exist_ok=True)
            save_diffusion_model(diffusion_model, folder)
            own = replace(config, diffusion_model=replace(config.diffusion_model, path=str(final)))
            save_conditioner(conditioner, own, folder)

    return save_in_one_piece(final, save, args.should_save, trainer.accelerator.wait_for_everyone)


def _check(recipe: Recipe):
    """Raises on recipes that train no denoiser."""
    if recipe.denoiser is None or not isinstance(recipe.feedback, FeedbackConfig) or recipe.model.encoder is None:
        raise ValueError(
            f"The recipe {recipe.name!r} trains no denoiser: it needs the sections `denoiser` and `feedback`, and "
            f"`model.encoder`. See the recipe `genhancer-denoiser`; for a model with feedback run `deem train`."
        )
    config, model = recipe.feedback, recipe.model
    condition = config.condition
    if config.objective.kind != "mse" or condition.shows_maps or condition.prompt:
        raise ValueError(
            "A denoiser of one's own is trained by its denoising error on the tower's tokens alone: leave "
            "`feedback.objective.kind`, `feedback.condition.prompt` and `feedback.condition.kind: queries+dense` out."
        )
    # All that names or holds a diffusion model: there is none but the one that is trained.
    settings = changed_settings(config.diffusion_model)
    settings = {f"feedback.diffusion_model.{name}": value for name, value in settings.items()}
    settings |= {"feedback.anchor_weight": config.anchor_weight, "feedback.conditioner": config.conditioner}
    settings |= {"data.target_size": recipe.data.target_size, "model.lora.r": model.lora.r}
    settings |= {"model.freeze": model.freeze, "model.learning_rates": model.learning_rates}
    if given := [name for name, value in settings.items() if value]:
        raise ValueError(
            f"{given} mean nothing here: the encoder stays as it is, denoiser and conditioner are new and train "
            f"alike, on pictures of `denoiser.image_size`. Leave them out."
        )
