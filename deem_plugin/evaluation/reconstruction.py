"""Pictures reconstructed from a tower's tokens alone: the plainest view of what the tower has kept."""

from pathlib import Path

import torch

from deem_plugin.feedback.checkpoint import load_conditioner
from deem_plugin.feedback.conditions import attached_maps, condition_of
from deem_plugin.feedback.config import RossConfig
from deem_plugin.feedback.diffusion_model import load_diffusion_model
from deem_plugin.feedback.sampling import sample_pictures
from deem_plugin.vision.eyes import Eyes
from deem_plugin.vision.normalization import process_image


def reconstruct_files(checkpoint, image_files, out, path=None, steps=50):
    """
    Writes one PNG with two rows: the pictures as the tower saw them, and what is sampled from its tokens.

    Args:
        checkpoint (`str` or `Path`): A VLM trained with feedback: model, processor and `feedback.safetensors`.
        image_files (`list[Path]`): Pictures to show.
        out (`str` or `Path`): The PNG.
        path (`str`, *optional*): Of the diffusion model; by default the one that the run was trained with.
        steps (`int`, *optional*, defaults to `50`): Denoising steps.

    Raises:
        ValueError: If its feedback was not one on the tower's tokens.
    """
    from PIL import Image
    from torchvision.utils import save_image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import deem_plugin.vision.auto  # noqa: F401  # so that checkpoints with our tower load

    conditioner, config = load_conditioner(checkpoint)
    if isinstance(config, RossConfig):
        raise ValueError(
            f"The feedback of {checkpoint} read what the language model says (`ross`), and a picture is reconstructed "
            f"from a tower's tokens. Give a checkpoint that was trained with the section `feedback`."
        )
    held = config.diffusion_model
    diffusion_model = load_diffusion_model(path or held.path, held.dtype)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    image_processor = AutoProcessor.from_pretrained(checkpoint).image_processor
    eyes = Eyes.of(model, image_processor)
    views = []
    for file in image_files:
        views.append(_whole(eyes.show(model, process_image(image_processor, Image.open(file).convert("RGB")))))
    with torch.no_grad():
        context, vector = condition_of(views, config.condition, conditioner)
        with attached_maps(views, config.condition, conditioner, diffusion_model):
            generator = torch.Generator().manual_seed(0)
            sampled = sample_pictures(diffusion_model, context, vector=vector, steps=steps, generator=generator)
    seen = diffusion_model.resize([view.picture.clamp(0, 1) for view in views])
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    save_image(torch.cat([seen, sampled]), out, nrow=len(views), padding=1, pad_value=1.0)


def _whole(views):
    """Returns the view that shows most of an image: its thumbnail where it was cut into tiles."""
    thumbnails = [view for view in views if view.kind == "thumbnail"]
    return (thumbnails or views)[0]
