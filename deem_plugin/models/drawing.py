"""Drawing with an interleaved model: pictures at image starts, and text and pictures in turn."""

import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from ..feedback.sampling import sample_pictures
from .assembly import with_end
from .deem import IMAGE_INPUTS
from .interleaving import image_places, row_starts
from .processing import IMAGE_START_TOKEN

GUIDANCE = 3.5  # of the authors
STEPS = 50  # the authors take 250 of DDPM


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
    _check_diffusion_model(model)
    ids = inputs["input_ids"]
    output = model(**inputs, logits_to_keep=1)
    starts = row_starts(ids, inputs.get("attention_mask"))
    options = {"steps": steps, "guidance": guidance, "scheduler": scheduler}
    return _draw(model, ids, starts, output.last_hidden_state, output.maps, seeds, options)


@torch.no_grad()
def generate_interleaved(
    model, processor, inputs, *, seed=0, max_images=4, steps=STEPS, guidance=GUIDANCE, **generation
) -> list[str | Image.Image]:
    """
    Writes and draws in turn: stops at an image start, draws the picture, reads it, and goes on.

    Every token is read once and as it was written: what was generated is decoded for the caller alone.

    Args:
        model (`DeemForConditionalGeneration`): With a diffusion model attached.
        processor (`DeemProcessor`): Of the model.
        inputs (`dict`):
            What the processor makes of one prompt and its pictures. If it ends in `<image_start>`, a picture comes
            first.
        seed (`int`, *optional*): Of the first picture; each further one has the next number.
        max_images (`int`, *optional*, defaults to 4): Pictures to draw at most.
        steps, guidance: As in [`sample_pictures`].
        generation: For `model.generate`, greedy or sampled; `max_new_tokens` counts for each stretch of text, which
            an image start ends beside what `eos_token_id` says.

    Returns:
        `list[str | Image.Image]`: What came, in order.

    Raises:
        ValueError: If no diffusion model is attached, there are several prompts, or several answers to one, several
            beams or no cache are asked for.
    """
    _check_diffusion_model(model)
    ids, shown = inputs["input_ids"], {name: value for name, value in inputs.items() if name in IMAGE_INPUTS}
    _check_one_answer(model, ids, generation)
    start, slots = model.config.image_start_token_id, [model.config.image_token_id] * processor.num_image_tokens
    ends = generation.pop("eos_token_id", model.generation_config.eos_token_id)
    options = {"steps": steps, "guidance": guidance, "scheduler": None}
    parts, drawn, read = [], 0, []  # `read` holds the output of each call of the model
    hook = model.register_forward_hook(lambda module, args, output: read.append(output))
    try:
        while True:
            if ids[0, -1] != start:
                output = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    **shown,
                    return_dict_in_generate=True,
                    eos_token_id=with_end(ends, start),
                    **_state(read),
                    **generation,
                )
                new, ids = output.sequences[0, ids.shape[1] :], output.sequences
                if text := processor.tokenizer.decode(new, skip_special_tokens=True):
                    parts.append(text)
            if ids[0, -1] != start or drawn == max_images:
                return parts
            unread = ids[:, sum(each.last_hidden_state.shape[1] for each in read) :]
            before = _state(read) if read else shown
            model(input_ids=unread, attention_mask=torch.ones_like(ids), logits_to_keep=1, use_cache=True, **before)
            hidden = torch.cat([each.last_hidden_state for each in read], dim=1)
            seen = [each.maps for each in read if each.maps is not None]
            maps = {name: torch.cat([each[name] for each in seen]) for name in seen[0]} if seen else None
            [picture] = _draw(model, ids, torch.zeros_like(ids), hidden, maps, [seed + drawn], options)
            parts.append(picture)
            drawn += 1
            pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
            shown = {"pixel_values": pixels.to(model.device)}
            ids = torch.cat([ids, ids.new_tensor([slots])], dim=1)
    finally:
        hook.remove()


def _state(read: list) -> dict:
    """Returns what the next call of the model goes on from."""
    return {"cache": read[-1].cache, "image_maps": read[-1].image_maps} if read else {}


def _check_one_answer(model, ids, generation) -> None:
    """Raises a `ValueError` unless there is one prompt, and one answer to it that goes on from a cache."""
    settings = model.generation_config.to_dict() | generation
    if (settings["num_beams"] or 1) > 1:
        raise ValueError("Text and pictures in turn are greedy or sampled; leave `num_beams` out.")
    if len(ids) > 1 or (settings["num_return_sequences"] or 1) > 1 or settings["use_cache"] is False:
        raise ValueError(
            f"Got {len(ids)} prompts, num_return_sequences={settings['num_return_sequences']} and "
            f"use_cache={settings['use_cache']}; text and pictures in turn are one answer to one prompt, with a "
            f"cache. Call once for each answer."
        )


def _check_diffusion_model(model) -> None:
    if model.diffusion_model is None:
        raise ValueError(
            "Drawing needs the diffusion model: call `model.attach_diffusion_model(load_diffusion_model(PATH))` first."
        )


def _draw(model, ids, starts, hidden, maps, seeds, options) -> list[Image.Image]:
    """
    Draws at the last image start of each row.

    Args:
        ids, starts (`torch.Tensor`): Tokens, and where the document of each begins, `(rows, tokens)`.
        hidden (`torch.Tensor`): Last hidden state of the language model, `(rows, tokens, hidden_size)`.
        maps (`dict[str, torch.Tensor]`, *optional*): The tower's maps of the pictures that were read.
        seeds (`list[int]`): One for each row.
        options (`dict`): `steps`, `guidance` and `scheduler` of [`sample_pictures`].
    """
    rows, _ = image_places(ids, model.config.image_start_token_id)
    absent = sorted(set(range(len(ids))) - set(rows.tolist()))
    if absent:
        raise ValueError(f"Rows {absent} have no {IMAGE_START_TOKEN}; end each text where the picture is to begin.")
    last = [int((rows == row).nonzero()[-1]) for row in range(len(ids))]
    context, _ = model.denoising.contexts(hidden, ids, starts)
    # The null context hides what was read, not the picture before: guidance leads away from it with its maps.
    repeats = 1 if options["guidance"] == 1.0 else 2
    with model.denoising.attached_previous(maps, ids, starts, chosen=last, repeats=repeats):
        pictures = sample_pictures(
            model.diffusion_model.to(context.device),
            context[last],
            null_context=model.denoising.image_decoder.null_context,
            generator=[torch.Generator(device=context.device).manual_seed(seed) for seed in seeds],
            **options,
        )
    return [to_pil_image(picture.cpu()) for picture in pictures]
