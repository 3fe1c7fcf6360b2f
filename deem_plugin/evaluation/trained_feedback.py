"""A checkpoint that was trained with feedback, loaded with its conditioner and diffusion model to be looked into."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deem_plugin.feedback.checkpoint import load_conditioner
from deem_plugin.feedback.conditions import attached_maps, condition_of
from deem_plugin.feedback.config import FeedbackConfig, ObjectiveConfig, RossConfig
from deem_plugin.feedback.diffusion_model import DiffusionModel, load_diffusion_model
from deem_plugin.files import naming_the_checkpoint
from deem_plugin.hub import at_revision
from deem_plugin.vision.eyes import Eyes
from deem_plugin.vision.normalization import process_image
from deem_plugin.vision.views import View


@dataclass
class TrainedFeedback:
    """
    A trained model, and what its feedback tells a diffusion model of each picture.

    Args:
        model (`nn.Module`): A vision-language or interleaved model, or a vision encoder alone, in eval mode.
        image_processor: Makes its inputs.
        eyes (`Eyes`): Of the model.
        conditioner (`Conditioner` or `HeadsConditioner`): Makes the denoiser's context of visual tokens.
        config (`FeedbackConfig`): The settings that it was trained with.
        diffusion_model (`DiffusionModel`): The frozen diffusion model.
    """

    model: nn.Module
    image_processor: Any
    eyes: Eyes
    conditioner: Any
    config: FeedbackConfig
    diffusion_model: DiffusionModel

    @classmethod
    def load(cls, checkpoint: str | Path, diffusion_model: str | None = None) -> "TrainedFeedback":
        """
        Loads a checkpoint onto a GPU where there is one, else the CPU.

        Args:
            checkpoint (`str` or `Path`): Folder with model, processor and `feedback.safetensors`.
            diffusion_model (`str`, *optional*): Folder or hub id; by default the one that the run was trained with.

        Raises:
            FileNotFoundError: If there is no `feedback.safetensors`, which an interleaved model does not need.
            ValueError: If the feedback did not read the tower's tokens, or something cannot be loaded.
        """
        model, image_processor, conditioner, config = _load(str(checkpoint))
        held = config.diffusion_model
        path = diffusion_model or held.path
        if path is None:
            raise ValueError(
                f"{checkpoint} is an interleaved model, which does not say what diffusion model it was trained with. "
                f"Name its folder by `--diffusion-model`."
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        frozen = load_diffusion_model(path, held.dtype, image_size=held.image_size).to(device)
        model = model.to(device).eval()
        if isinstance(conditioner, nn.Module):
            conditioner.to(device).eval()
        return cls(model, image_processor, Eyes.of(model, image_processor), conditioner, config, frozen)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def view(self, image) -> View:
        """
        Shows a PIL image in RGB to the model. Returns the view that shows most of it: its thumbnail where it was cut
        into tiles.
        """
        views = self.eyes.show(self.model, process_image(self.image_processor, image))
        thumbnails = [view for view in views if view.kind == "thumbnail"]
        return (thumbnails or views)[0]

    @torch.no_grad()
    def condition(self, views: list[View]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the denoiser's context `(views, tokens, dim)` of views, and the vector `(views, dim)` or None."""
        return condition_of(views, self.config.condition, self.conditioner)

    def maps(self, views: list[View]):
        """Returns a context in which the denoiser sees the maps of views, where it did in the training."""
        return attached_maps(views, self.config.condition, self.conditioner, self.diffusion_model)


def _load(checkpoint: str):
    """Returns a model, its image processor, its conditioner, and the settings of its feedback."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoImageProcessor, AutoModel

    from deem_plugin.evaluation.loading import load_vlm
    from deem_plugin.models import DeemConfig  # registers our model and tower with the Auto classes
    from deem_plugin.models.denoising import HeadsConditioner
    from deem_plugin.training.encoder import vision_part

    is_adapter = (Path(checkpoint) / "adapter_config.json").is_file()
    with naming_the_checkpoint("checkpoint", checkpoint):
        kind = None if is_adapter else AutoConfig.from_pretrained(**at_revision(checkpoint))
    if isinstance(kind, DeemConfig):
        model, processor = load_vlm(checkpoint)
        if model.denoising is None:
            raise ValueError(
                f"{checkpoint} was made without a diffusion model, so its tokens were never shown to one."
            )
        objective = ObjectiveConfig(timestep_sampling=kind.feedback_timesteps)
        config = FeedbackConfig(condition=model.denoising.condition, objective=objective)
        return model, processor.image_processor, HeadsConditioner(model.denoising), config
    conditioner, config = load_conditioner(checkpoint)
    if isinstance(config, RossConfig):
        raise ValueError(
            f"The feedback of {checkpoint} read what the language model says (`ross`), and a picture is "
            f"reconstructed from a tower's tokens. Give a checkpoint that was trained with the section `feedback`."
        )
    if is_adapter or type(kind) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        model, processor = load_vlm(checkpoint)
        return model, processor.image_processor, conditioner, config
    with naming_the_checkpoint("checkpoint", checkpoint):
        whole = AutoModel.from_pretrained(**at_revision(checkpoint))
        image_processor = AutoImageProcessor.from_pretrained(**at_revision(checkpoint))
    return vision_part(whole, config.condition.reads_pooled), image_processor, conditioner, config
