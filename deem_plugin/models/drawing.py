"""Drawing with an interleaved model: pictures at image starts, and text and pictures in turn."""

import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from ..feedback.sampling import sample_pictures
from .denoising import attached_previous, image_contexts
from .interleaving import image_places, row_starts
from .processing import IMAGE_START_TOKEN

GUIDANCE = 3.5  # of the authors
STEPS = 50  # the authors take 250 of DDPM


def _seeded(seeds, device) -> list[torch.Generator]:
    return [torch.Generator(device=device).manual_seed(seed) for seed in seeds]


@torch.no_grad()
def generate_images(model, inputs, seeds, *, steps=STEPS, guidance=GUIDANCE, scheduler=None) -> list[Image.Image]:
    """
    Draws what comes at the last image start of each row.

    Args:
        model (`DeemForConditionalGeneration`): With a diffusion model attached.
        inputs (`dict`): What the processor makes of texts that end in `<image_start>`, padded on either side.
        seeds (`list[int]`): One for each row; a picture depends on its own seed alone.
        steps, guidance, scheduler: As in [`sample_pictures`].

    Returns:
        `list[Image.Image]`: One picture a row, at the diffusion model's size.

    Raises:
        ValueError: If no diffusion model is attached, or a row has no image start.
    """
    if model.diffusion_model is None:
        raise ValueError(
            "Drawing needs the diffusion model: call `model.attach_diffusion_model(load_diffusion_model(PATH))` first."
        )
    ids = inputs["input_ids"]
    rows, places = image_places(ids, model.config.image_start_token_id)
    absent = sorted(set(range(len(ids))) - set(rows.tolist()))
    if absent:
        raise ValueError(f"Rows {absent} have no {IMAGE_START_TOKEN}; end each text where the picture is to begin.")
    last = [int((rows == row).nonzero()[-1]) for row in range(len(ids))]
    output = model(**inputs)
    starts = row_starts(ids, inputs.get("attention_mask"))
    context, _ = image_contexts(model, output.last_hidden_state, ids, starts)
    # The null context hides what was read, not the picture before: guidance leads away from it with its maps.
    with attached_previous(model, output.maps, ids, starts, chosen=last, repeats=1 if guidance == 1.0 else 2):
        pictures = sample_pictures(
            model.diffusion_model.to(context.device),
            context[last],
            steps=steps,
            scheduler=scheduler,
            guidance=guidance,
            null_context=model.image_decoder.null_context,
            generator=_seeded(seeds, context.device),
        )
    return [to_pil_image(picture.cpu()) for picture in pictures]


@torch.no_grad()
def generate_interleaved(
    model, processor, prompt, images=(), *, seed=0, max_images=4, steps=STEPS, guidance=GUIDANCE, **generation
) -> list[str | Image.Image]:
    """
    Writes and draws in turn: stops at an image start, draws the picture, reads it, and goes on.

    Args:
        model (`DeemForConditionalGeneration`): With a diffusion model attached.
        processor (`DeemProcessor`): Of the model.
        prompt (`str`): Text with marks.
        images (`Sequence[Image.Image]`, *optional*): The pictures of the marks.
        seed (`int`, *optional*): Of the first picture; each further one has the next number.
        max_images (`int`, *optional*, defaults to 4): Pictures to draw at most.
        steps, guidance: As in [`sample_pictures`].
        generation: For `model.generate`; `max_new_tokens` counts for each stretch of text.

    Returns:
        `list[str | Image.Image]`: What came, in order.
    """
    parts, images = [], list(images)
    start = model.config.image_start_token_id
    while True:
        inputs = processor(text=prompt, images=images or None, return_tensors="pt").to(model.device)
        new = model.generate(**inputs, **generation)[0, inputs["input_ids"].shape[1] :]
        text = processor.tokenizer.decode(new, skip_special_tokens=True)
        if text:
            parts.append(text)
        if start not in new.tolist() or sum(not isinstance(part, str) for part in parts) == max_images:
            return parts
        drawn = processor(text=prompt + text + IMAGE_START_TOKEN, images=images or None, return_tensors="pt")
        [picture] = generate_images(model, drawn.to(model.device), [seed], steps=steps, guidance=guidance)
        parts.append(picture)
        images.append(picture)
        prompt, seed = prompt + text + processor.image_token, seed + 1
