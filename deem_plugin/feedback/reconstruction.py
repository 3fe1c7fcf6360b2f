"""What a generator paints from a tower's tokens alone: the plainest view of what the tower has kept."""

from pathlib import Path

import torch

from .checkpoint import load_conditioner
from .conditions import condition_tokens, dense_maps
from .diffusion_model import load_diffusion_model
from .objectives import unnormalize
from .painting import paint
from .views import TokenReading, image_views


@torch.no_grad()
def picture_condition(model, conditioner, pixel_values, condition="queries"):
    """
    Returns the condition that a VLM's tower and a conditioner make of pictures.

    Args:
        model (`PreTrainedModel`): The VLM.
        conditioner (`Conditioner`): As trained beside it.
        pixel_values (`torch.Tensor`): Shape `(batch, 3, height, width)`, normalised by the VLM's processor.
        condition (`str`, *optional*, defaults to `"queries"`): What it was trained to show, see `FeedbackConfig`.

    Returns:
        `tuple`: The context `(batch, queries, context_dim)`, the vector `(batch, vector_dim)` or None, and the maps
        that the generator looks at, or None.
    """
    from ..vision.hosts import find_tower

    reading = TokenReading.of(model.config)
    tower = find_tower(model)
    inputs = {"pixel_values": pixel_values.to(tower.dtype)}
    output = tower(**inputs, output_hidden_states=bool(reading.layers))
    views = image_views(inputs, output, reading)
    tokens, mask = condition_tokens(views, condition)
    maps = dense_maps(views) if conditioner.synchroniser is not None else None
    return conditioner(tokens, mask), conditioner.vector(tokens), maps


def reconstruct_files(checkpoint, image_files, out, denoiser=None, steps=50):
    """
    Writes one PNG with two rows: the pictures as the tower saw them, and what the generator paints of its tokens.

    Args:
        checkpoint (`str` or `Path`): A VLM trained with feedback: model, processor and `feedback.safetensors`.
        image_files (`list[Path]`): Pictures to show.
        out (`str` or `Path`): The PNG.
        denoiser (`str`, *optional*): The generator; by default the one that the run was trained with.
        steps (`int`, *optional*, defaults to `50`): Denoising steps.

    Raises:
        ValueError: If its feedback was not one on the tower's tokens.
    """
    from PIL import Image
    from torchvision.utils import save_image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import deem_plugin.vision  # noqa: F401  (registers the tower with the Auto classes)

    conditioner, settings = load_conditioner(checkpoint)
    if settings.get("source") == "llm":
        raise ValueError(
            f"The feedback of {checkpoint} hung at the language model (`source: llm`), and a generator paints from a "
            f"tower's tokens. Give a checkpoint that was trained with `source: tower`."
        )
    generator = load_diffusion_model(denoiser or settings["denoiser"], settings["dtype"])
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    image_processor = AutoProcessor.from_pretrained(checkpoint).image_processor
    images = [Image.open(file).convert("RGB") for file in image_files]
    pixel_values = image_processor(images, return_tensors="pt")["pixel_values"]

    context, vector, maps = picture_condition(model, conditioner, pixel_values, settings["condition"])
    with conditioner.looking(generator.denoiser.model, maps):
        painted = paint(generator, context, vector=vector, steps=steps, rng=torch.Generator().manual_seed(0))
    seen = generator.resize(unnormalize(pixel_values, image_processor.image_mean, image_processor.image_std))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    save_image(torch.cat([seen, painted]), out, nrow=len(images), padding=1, pad_value=1.0)
