"""The two losses of a frozen diffusion model: the same image from what the tower saw, the next from what was read."""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from ..feedback.config import ConditionConfig
from ..feedback.diffusion_feedback import DiffusionFeedback
from ..feedback.loss import FeedbackLoss
from ..feedback.timesteps import TIMESTEP_SAMPLERS
from ..vision.grids import positioned_maps, region_to_patches
from ..vision.normalization import unnormalize
from ..vision.views import View
from .interleaving import count_documents, has_picture, image_places, previous_images, reversed_contexts, row_starts
from .losses import Draws, mean_of_valid
from .maps import of_previous

# A picture behind no more than the first token of its document and its own start has nothing to be drawn from.
SHORTEST_CONTEXT = 2


@dataclass
class Reading:
    """
    What a model has made of a batch, for the losses that follow.

    Args:
        input_ids (`torch.Tensor`): Shape `(batch, tokens)`.
        starts (`torch.Tensor`): Where the document of each token begins in its row, `(batch, tokens)`.
        hidden_states (`torch.Tensor`): Of the language model, `(batch, tokens, hidden_size)`.
        image_tokens (`torch.Tensor`): What the tower saw, `(images, queries, tower width)`.
        maps (`dict[str, torch.Tensor]`): The tower's maps.
        pictures (`torch.Tensor`): What the diffusion model must restore, `(images, 3, height, width)` in [0, 1].
        region_masks (`torch.Tensor`, *optional*): Shape `(images, 1, height, width)`.
        image_loss_mask (`torch.Tensor`, *optional*): Zero where the next image is not to be learned, `(images,)`.
        totals (`torch.Tensor`, *optional*): What to divide by, as `totals_of` returns it; `(2,)`.
        posterior (`tuple`, *optional*): What the autoencoder says of the pictures; asked once for both losses.
    """

    input_ids: torch.Tensor
    starts: torch.Tensor
    hidden_states: torch.Tensor
    image_tokens: torch.Tensor
    maps: dict[str, torch.Tensor]
    pictures: torch.Tensor
    region_masks: torch.Tensor | None = None
    image_loss_mask: torch.Tensor | None = None
    totals: torch.Tensor | None = None
    posterior: tuple | None = None


def restorable_pictures(config, pixel_values, target_pixel_values=None):
    """
    Returns the pictures that the diffusion model must restore, `(images, 3, height, width)` in [0, 1].

    Args:
        config (`DeemConfig`): Knows how `pixel_values` were normalised.
        pixel_values (`torch.Tensor`): What the tower reads, `(images, 3, size, size)`.
        target_pixel_values (`torch.Tensor`, *optional*): The same pictures in [-1, 1], at the diffusion model's size.
    """
    if target_pixel_values is None:
        vision = config.vision_config
        return unnormalize(pixel_values, vision.image_mean, vision.image_std).clamp(0, 1)
    return target_pixel_values.float().clamp(-1, 1) / 2 + 0.5


class _Heads:
    """
    The model's own parts as the conditioner of a [`FeedbackLoss`]: a linear head, and the maps of the pictures.

    Args:
        model (`DeemForConditionalGeneration`): Has both.
        reading (`Reading`): Of the batch whose views are restored.
    """

    def __init__(self, model, reading):
        self.model = model
        self.reading = reading

    def __call__(self, tokens, token_mask=None, positions=None):
        """Makes the denoiser's context of queries `(images, queries, tower width)`."""
        return self.model.feedback_head(tokens)

    def vector(self, tokens):
        """Returns None: nothing modulates the denoiser."""

    def attached_to(self, unet, views):
        """Returns a context in which `unet` sees the maps of each picture, inside its region where there is one."""
        maps = positioned_maps(self.reading.maps, self.reading.region_masks)
        itself = torch.ones(len(views), 1, device=maps[0].device)
        return self.model.unet_synchroniser.attached(unet, [level[:, None] for level in maps], itself)


def feedback_loss(model, reading, draws=None, generator=None):
    """
    The error of each image from its own queries (CSR, Eq. 5), inside its region where there is one, by the path of
    all feedback: [`FeedbackLoss`].

    Args:
        model (`DeemForConditionalGeneration`): With a diffusion model attached.
        reading (`Reading`): Of a batch.
        draws (`Draws`, *optional*): Instead of drawing.
        generator (`torch.Generator`, *optional*): Source of what is drawn.

    Returns:
        `ImageLosses`: Image by image, and their sum with its graph.
    """
    draws = draws or Draws()
    latents = _draw_latents(model, reading, draws, generator)
    frozen = model.diffusion_model
    objective = DiffusionFeedback(frozen.denoiser, TIMESTEP_SAMPLERS[model.config.feedback_timesteps])
    condition = ConditionConfig(kind="queries+dense" if model.config.feedback_maps else "queries")
    loss = FeedbackLoss(frozen, objective, condition)
    return loss(
        views_of(reading, latents.shape[-2:]),
        _Heads(model, reading),
        generator,
        latents=latents,
        noise=draws.noise,
        timesteps=draws.timesteps,
    )


def views_of(reading, size):
    """
    Returns the pictures of a batch with what the tower saw of them.

    Args:
        reading (`Reading`): Of the batch.
        size (`tuple[int, int]`): Height and width of the latents, in cells, whose mask a region becomes.

    Returns:
        `list[View]`: One an image.
    """
    masks = [None] * len(reading.pictures)
    if reading.region_masks is not None:
        cells = region_to_patches(reading.region_masks, *size)
        masks = cells.bool().mT.unflatten(-1, tuple(size))[:, 0]
    pairs = zip(reading.image_tokens, reading.pictures, masks, strict=True)
    return [View(tokens, picture, index, mask=mask) for index, (tokens, picture, mask) in enumerate(pairs)]


def image_loss(model, reading, draws=None, generator=None):
    """
    The error of the next image from what stands before it (NIP, Eq. 3); arguments as in `feedback_loss`.

    Pictures with a context of `SHORTEST_CONTEXT` tokens or less do not count.

    Returns:
        `torch.Tensor`: The mean over the images that count, a scalar.
    """
    config, draws = model.config, draws or Draws()
    context, lengths = image_contexts(model, reading.hidden_states, reading.input_ids, reading.starts)
    dropped = draws.dropped
    if dropped is None:
        rate = config.null_context_rate if model.training else 0.0
        dropped = torch.rand(len(context), generator=generator, device=context.device) < rate
    if config.has_defect("normalised_twice"):
        # The official code hands over what it has normalised to [-1, 1], and normalises it once more.
        reading = replace(reading, pictures=reading.pictures * 2 - 1, posterior=None)
    latents = _draw_latents(model, reading, draws, generator)
    with attached_previous(model, reading.maps, reading.input_ids, reading.starts):
        losses = DiffusionFeedback(model.diffusion_model.denoiser)(
            latents,
            model.image_decoder.drop(context, dropped),
            timesteps=draws.timesteps,
            noise=draws.noise,
            generator=generator,
        )
    valid = images_to_learn(lengths, reading.image_loss_mask)
    if config.has_defect("mean_over_all"):
        return (losses * valid).mean()
    return mean_of_valid(losses, valid, None if reading.totals is None else reading.totals[1])


def images_to_learn(lengths, image_loss_mask=None):
    """Returns which images count in the next-image loss, by the tokens of their contexts; `(images,)`."""
    valid = lengths > SHORTEST_CONTEXT
    return valid if image_loss_mask is None else valid & (image_loss_mask != 0)


def totals_of(config, inputs):
    """
    Counts what the two denoising losses of a batch are divided by: its documents for the feedback, as a callback's is
    by its conversations, and the images that count for the next-image loss.

    Args:
        config (`DeemConfig`): Knows the image start.
        inputs (`Mapping`): What `forward` gets.

    Returns:
        `torch.Tensor`: Two integers, shape `(2,)`.
    """
    ids, document_ids = inputs["input_ids"], inputs.get("document_ids")
    starts = row_starts(ids, inputs.get("attention_mask"), document_ids)
    rows, places = image_places(ids, config.image_start_token_id)
    learned = images_to_learn(places - starts[rows, places] + 1, inputs.get("image_loss_mask"))
    documents = count_documents(ids, document_ids)
    if config.has_defect("mean_over_images"):
        documents = torch.as_tensor(len(rows), device=ids.device)
    return torch.stack([documents, learned.sum()])


def image_contexts(model, hidden_states, input_ids, starts):
    """
    Makes the denoiser's context of what stands before each image start.

    Args:
        model (`DeemForConditionalGeneration`): Has the image decoder.
        hidden_states, input_ids, starts (`torch.Tensor`): As in [`Reading`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Contexts `(images, queries, context_dim)`, and how many tokens each was
        made of, `(images,)`.
    """
    rows, places = image_places(input_ids, model.config.image_start_token_id)
    states, mask = reversed_contexts(hidden_states, rows, places, starts[rows, places])
    return model.image_decoder(states.to(model.image_decoder.projection.weight.dtype), mask), mask.sum(1)


def attached_previous(model, maps, input_ids, starts, chosen=slice(None), repeats=1):
    """
    Returns a context in which the UNet sees the maps of the image before each one; without a synchroniser it does
    nothing.

    Args:
        model (`DeemForConditionalGeneration`): With a diffusion model attached.
        maps (`dict[str, torch.Tensor]`): The tower's maps of the images that were read.
        input_ids, starts (`torch.Tensor`): As in [`Reading`].
        chosen (`slice` or `list[int]`, *optional*): Which of the image starts are drawn.
        repeats (`int`, *optional*): How often the batch comes in one call of the UNet: twice under guidance.
    """
    if model.unet_synchroniser is None or maps is None:
        return nullcontext()
    rows, places = image_places(input_ids, model.config.image_start_token_id)
    previous = previous_images(rows, places, starts[rows, places])[chosen]
    # Maps are there of pictures that were read; a start at the end of a prompt has none yet.
    read = has_picture(input_ids, rows, places, model.config.image_token_id)
    previous = torch.where((previous >= 0) & read[previous], read.cumsum(0)[previous] - 1, -1)
    before, seen = of_previous(positioned_maps(maps), previous)
    before = [torch.cat([level] * repeats) for level in before]
    return model.unet_synchroniser.attached(model.diffusion_model.denoiser.model, before, torch.cat([seen] * repeats))


def _draw_latents(model, reading, draws, generator):
    """Draws latents of the pictures; each loss its own from one posterior, for encoding is half of a step's time."""
    frozen = model.diffusion_model.to(reading.pictures.device)
    if reading.posterior is None:
        reading.posterior = frozen.posterior(reading.pictures)
    return frozen.codec.draw(*reading.posterior, noise=draws.latent_noise, generator=generator)
