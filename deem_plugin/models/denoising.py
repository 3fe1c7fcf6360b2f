"""What speaks to a frozen diffusion model: the same image from what the tower saw, the next from what was read."""

from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn

from ..feedback.config import ConditionConfig
from ..feedback.denoisers import check_context_dim
from ..feedback.diffusion_feedback import DiffusionFeedback
from ..feedback.loss import FeedbackLoss, ImageLosses
from ..feedback.synchroniser import UNetSynchroniser
from ..feedback.timesteps import TIMESTEP_SAMPLERS
from ..vision.grids import positioned_maps, region_to_patches
from ..vision.normalization import unnormalize
from ..vision.views import View
from .image_decoder import ImageDecoder
from .interleaving import count_documents, has_picture, image_places, previous_images, reversed_contexts, row_starts
from .losses import Draws, mean_of_valid

# A picture behind no more than the first token of its document and its own start has nothing to be drawn from.
SHORTEST_CONTEXT = 2


@dataclass
class DenoisingBatch:
    """
    What a model has made of a batch, for the losses that follow.

    Args:
        input_ids (`torch.Tensor`): Shape `(batch, tokens)`.
        starts (`torch.Tensor`): Where the document of each token begins in its row, `(batch, tokens)`.
        hidden_states (`torch.Tensor`): Of the language model, `(batch, tokens, hidden_size)`.
        image_tokens (`torch.Tensor`): What the tower saw, `(images, queries, tower width)`.
        maps (`dict[str, torch.Tensor]`): The tower's maps.
        pictures (`torch.Tensor`): What the diffusion model must restore, `(images, 3, height, width)` in [0, 1].
        totals (`torch.Tensor`): What the losses are divided by, as `totals_of` returns it; `(2,)`.
        region_masks (`torch.Tensor`, *optional*): Shape `(images, 1, height, width)`.
        image_loss_mask (`torch.Tensor`, *optional*): Zero where the next image is not to be learned, `(images,)`.
        posterior (`tuple`, *optional*): What the autoencoder says of the pictures; asked once for both losses.
    """

    input_ids: torch.Tensor
    starts: torch.Tensor
    hidden_states: torch.Tensor
    image_tokens: torch.Tensor
    maps: dict[str, torch.Tensor]
    pictures: torch.Tensor
    totals: torch.Tensor
    region_masks: torch.Tensor | None = None
    image_loss_mask: torch.Tensor | None = None
    posterior: tuple | None = None


@dataclass
class HeadsConditioner:
    """
    The heads as the conditioner of a [`FeedbackLoss`]: a linear layer, and the maps of the pictures.

    Args:
        heads (`DenoisingHeads`): The heads.
        region_masks (`torch.Tensor`, *optional*): What of each picture the denoiser sees maps of, `(images, 1, height,
            width)`; all by default.
    """

    heads: "DenoisingHeads"
    region_masks: torch.Tensor | None = None

    def __call__(self, tokens, token_mask=None, positions=None):
        """Makes the denoiser's context of queries `(images, queries, tower width)`."""
        return self.heads.feedback_head(tokens)

    def vector(self, tokens):
        """Returns None: nothing modulates the denoiser."""

    def attached_to(self, unet, views):
        """Returns a context in which `unet` sees the maps of each picture, inside its region where there is one."""
        stacked = {name: torch.stack([view.maps[name] for view in views]) for name in views[0].maps}
        maps = positioned_maps(stacked, self.region_masks)
        itself = torch.ones(len(views), 1, device=maps[0].device)
        return self.heads.unet_synchroniser.attached(unet, [level[:, None] for level in maps], itself)


class DenoisingHeads(nn.Module):
    """
    The parts of a DEEM that speak to one frozen diffusion model, which is attached and no module of theirs.

    Args:
        config (`DeemConfig`): Of the model, with a `context_dim`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.feedback_head = nn.Linear(config.vision_config.hidden_size, config.context_dim)
        self.image_decoder = ImageDecoder(config)
        self.unet_synchroniser = None
        if config.unet_synchroniser is not None:
            options = dict(config.unet_synchroniser)
            unet = SimpleNamespace(**options.pop("unet"))
            self.unet_synchroniser = UNetSynchroniser(unet, config.vision_config.encoder_dim, **options)
        self.diffusion_model = None

    def attach(self, diffusion_model):
        """Gives the heads their diffusion model; raises a `ValueError` if they do not fit the denoiser's context."""
        check_context_dim(self.config.context_dim, diffusion_model.denoiser)
        self.diffusion_model = diffusion_model

    def forward(
        self, batch: DenoisingBatch, draws: dict[str, Draws] | None = None, generator: torch.Generator | None = None
    ) -> tuple[ImageLosses | None, torch.Tensor | None]:
        """
        Computes the losses whose weight is not 0; the others are `None`.

        Args:
            batch (`DenoisingBatch`): With at least one picture.
            draws (`dict[str, Draws]`, *optional*): Under `"feedback"` and `"image"`, instead of drawing.
            generator (`torch.Generator`, *optional*): Source of what is drawn.

        Returns:
            `tuple[ImageLosses, torch.Tensor]`: The same image, one by one, and the next image, a mean.
        """
        draws = draws or {}
        same = next_image = None
        if self.config.feedback_weight:
            same = self.feedback_loss(batch, draws.get("feedback", Draws()), generator)
        if self.config.image_weight:
            next_image = self.image_loss(batch, draws.get("image", Draws()), generator)
        return same, next_image

    @property
    def condition(self) -> ConditionConfig:
        """What the denoiser is shown of the same image."""
        return ConditionConfig(kind="queries+dense" if self.config.feedback_maps else "queries")

    def feedback_loss(self, batch: DenoisingBatch, draws: Draws, generator=None) -> ImageLosses:
        """
        The error of each image from its own queries (CSR, Eq. 5), inside its region where there is one, by the path
        of all feedback: [`FeedbackLoss`].
        """
        latents = self._draw_latents(batch, draws, generator)
        objective = DiffusionFeedback(self.diffusion_model.denoiser, TIMESTEP_SAMPLERS[self.config.feedback_timesteps])
        return FeedbackLoss(self.diffusion_model, objective, self.condition)(
            self._views(batch, latents.shape[-2:]),
            HeadsConditioner(self, batch.region_masks),
            generator,
            latents=latents,
            noise=draws.noise,
            timesteps=draws.timesteps,
        )

    def _views(self, batch, size):
        """Returns the pictures with what the tower saw of them; `size` is that of the latents, in cells."""
        masks = [None] * len(batch.pictures)
        if batch.region_masks is not None:
            cells = region_to_patches(batch.region_masks, *size)
            masks = cells.bool().mT.unflatten(-1, tuple(size))[:, 0]
        views = []
        for index, (tokens, picture, mask) in enumerate(zip(batch.image_tokens, batch.pictures, masks, strict=True)):
            maps = {name: level[index] for name, level in batch.maps.items()}
            views.append(View(tokens, picture, index, maps=maps, mask=mask))
        return views

    def image_loss(self, batch: DenoisingBatch, draws: Draws, generator=None) -> torch.Tensor:
        """
        The error of the next image from what stands before it (NIP, Eq. 3), a scalar: the mean over those that count,
        which are not pictures with a context of `SHORTEST_CONTEXT` tokens or less.
        """
        context, lengths = self.contexts(batch.hidden_states, batch.input_ids, batch.starts)
        dropped = draws.dropped
        if dropped is None:
            rate = self.config.null_context_rate if self.training else 0.0
            dropped = torch.rand(len(context), generator=generator, device=context.device) < rate
        latents = self._draw_latents(batch, draws, generator)
        with self.attached_previous(batch.maps, batch.input_ids, batch.starts):
            losses = DiffusionFeedback(self.diffusion_model.denoiser)(
                latents,
                self.image_decoder.drop(context, dropped),
                timesteps=draws.timesteps,
                noise=draws.noise,
                generator=generator,
            )
        return mean_of_valid(losses, images_to_learn(lengths, batch.image_loss_mask), batch.totals[1])

    def contexts(self, hidden_states, input_ids, starts) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Makes the denoiser's context of what stands before each image start; arguments as in [`DenoisingBatch`].

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Contexts `(images, queries, context_dim)`, and how many tokens each
            was made of, `(images,)`.
        """
        rows, places = image_places(input_ids, self.config.image_start_token_id)
        states, mask = reversed_contexts(hidden_states, rows, places, starts[rows, places])
        return self.image_decoder(states.to(self.image_decoder.projection.weight.dtype), mask), mask.sum(1)

    def attached_previous(self, maps, input_ids, starts, chosen=slice(None), repeats=1):
        """
        Returns a context in which the UNet sees the maps of the image before each one; without a synchroniser it does
        nothing.

        Args:
            maps (`dict[str, torch.Tensor]`): The tower's maps of the images that were read.
            input_ids, starts (`torch.Tensor`): As in [`DenoisingBatch`].
            chosen (`slice` or `list[int]`, *optional*): Which of the image starts are drawn.
            repeats (`int`, *optional*): How often the batch comes in one call of the UNet: twice under guidance.
        """
        if self.unet_synchroniser is None or maps is None:
            return nullcontext()
        rows, places = image_places(input_ids, self.config.image_start_token_id)
        previous = previous_images(rows, places, starts[rows, places])[chosen]
        # Maps are there of pictures that were read; a start at the end of a prompt has none yet.
        read = has_picture(input_ids, rows, places, self.config.image_token_id)
        previous = torch.where((previous >= 0) & read[previous], read.cumsum(0)[previous] - 1, -1)
        previous = previous.repeat(repeats)
        seen = previous >= 0
        before = [(level[previous] * seen[:, None, None, None])[:, None] for level in positioned_maps(maps)]
        return self.unet_synchroniser.attached(self.diffusion_model.denoiser.model, before, seen[:, None])

    def _draw_latents(self, batch, draws, generator):
        """Draws latents of the pictures; each loss its own from one posterior: encoding is half of a step's time."""
        frozen = self.diffusion_model.to(batch.pictures.device)
        if batch.posterior is None:
            batch.posterior = frozen.posterior(batch.pictures)
        return frozen.codec.draw(*batch.posterior, noise=draws.latent_noise, generator=generator)


def restorable_pictures(config, pixel_values, target_pixel_values=None):
    """Returns what the diffusion model must restore: the targets in [-1, 1], or else the tower's input, in [0, 1]."""
    if target_pixel_values is None:
        return unnormalize(pixel_values, config.vision_config.image_mean, config.vision_config.image_std)
    return target_pixel_values.float().clamp(-1, 1) / 2 + 0.5


def totals_of(config, inputs) -> torch.Tensor:
    """
    Counts what the two losses of a batch are divided by: its documents for the feedback, as a callback's is by its
    conversations, and the images that count for the next-image loss; two integers, `(2,)`.

    Args:
        config (`DeemConfig`): Knows the image start.
        inputs (`Mapping`): What the model's `forward` gets.
    """
    ids, document_ids = inputs["input_ids"], inputs.get("document_ids")
    starts = row_starts(ids, inputs.get("attention_mask"), document_ids)
    rows, places = image_places(ids, config.image_start_token_id)
    learned = images_to_learn(places - starts[rows, places] + 1, inputs.get("image_loss_mask"))
    return torch.stack([count_documents(ids, document_ids), learned.sum()])


def images_to_learn(lengths, image_loss_mask=None):
    """Returns which images count in the next-image loss, by the tokens of their contexts; `(images,)`."""
    valid = lengths > SHORTEST_CONTEXT
    return valid if image_loss_mask is None else valid & (image_loss_mask != 0)
