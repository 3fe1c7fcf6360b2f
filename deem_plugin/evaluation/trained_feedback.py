"""A checkpoint that was trained with feedback, loaded with its conditioner and diffusion model to be looked into."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deem_plugin.feedback.checkpoint import load_conditioner
from deem_plugin.feedback.conditions import attached_maps, condition_of
from deem_plugin.feedback.config import FeedbackConfig, RossConfig
from deem_plugin.feedback.diffusion_model import DiffusionModel, load_diffusion_model
from deem_plugin.vision.eyes import Eyes
from deem_plugin.vision.normalization import process_image
from deem_plugin.vision.views import View


@dataclass
class TrainedFeedback:
    """
    A trained model, and what its feedback told a diffusion model of each picture.

    Args:
        model (`nn.Module`): A vision-language model, or a vision encoder alone, in eval mode.
        image_processor: Makes its inputs.
        eyes (`Eyes`): Of the model.
        conditioner (`Conditioner`): Makes the denoiser's context of visual tokens.
        config (`FeedbackConfig`): The settings that it was trained with.
        diffusion_model (`DiffusionModel`): The frozen diffusion model.
    """

    model: nn.Module
    image_processor: Any
    eyes: Eyes
    conditioner: nn.Module
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
            FileNotFoundError: If there is no `feedback.safetensors`.
            ValueError: If the feedback did not read the tower's tokens, or something cannot be loaded.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        conditioner, config = load_conditioner(checkpoint)
        if isinstance(config, RossConfig):
            raise ValueError(
                f"The feedback of {checkpoint} read what the language model says (`ross`), and a picture is "
                f"reconstructed from a tower's tokens. Give a checkpoint that was trained with the section `feedback`."
            )
        model, image_processor = _load_model(str(checkpoint), config.condition.reads_pooled)
        held = config.diffusion_model
        frozen = load_diffusion_model(diffusion_model or held.path, held.dtype, image_size=held.image_size)
        model, conditioner = model.to(device).eval(), conditioner.to(device).eval()
        return cls(model, image_processor, Eyes.of(model, image_processor), conditioner, config, frozen.to(device))

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


def _load_model(checkpoint: str, reads_pooled: bool):
    """Returns a vision-language model or a vision encoder, and its image processor."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoImageProcessor, AutoModel

    import deem_plugin.models  # noqa: F401  # registers our model and tower with the Auto classes
    from deem_plugin.evaluation.loading import load_vlm
    from deem_plugin.training.encoder import vision_part

    is_adapter = (Path(checkpoint) / "adapter_config.json").is_file()
    if is_adapter or type(AutoConfig.from_pretrained(checkpoint)) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        model, processor = load_vlm(checkpoint)
        return model, processor.image_processor
    whole = AutoModel.from_pretrained(checkpoint)
    return vision_part(whole, reads_pooled), AutoImageProcessor.from_pretrained(checkpoint)
