"""The one path of a picture: views, condition, latents, denoising error, as a pure function."""

from dataclasses import dataclass, replace

import torch

from ..vision.eyes import Eyes
from ..vision.views import View, is_blank, sample_views
from .conditions import attached_maps, condition_of
from .config import ConditionConfig
from .denoisers import Denoiser
from .early_gradient import early_gradient
from .finite import FiniteGate
from .pictures import fit, latent_mask


@dataclass
class ImageLosses:
    """
    What [`FeedbackLoss`] gives.

    Args:
        total (`torch.Tensor`): Sum over the images of the mean over their views, a scalar with its graph.
        per_image (`torch.Tensor`): The loss of each image, detached, `(images,)`; 0 where it was left out.
        counted (`torch.Tensor`): Whether each image counts, bool, `(images,)`: not those that were left out.
        images (`torch.Tensor`): Number of images that count, a scalar; of those with views in another call of the
            tower, too, only the share in this one.
        nonfinite (`torch.Tensor`): Views whose loss or gradient was not finite and is left out, a scalar.
        blank (`torch.Tensor`): Views of one colour or without a cell that counts, which are left out, a scalar.
        views (`int`): Views that were restored, these two kinds among them.
    """

    total: torch.Tensor
    per_image: torch.Tensor
    counted: torch.Tensor
    images: torch.Tensor
    nonfinite: torch.Tensor
    blank: torch.Tensor
    views: int

    @property
    def mean(self) -> torch.Tensor:
        """Mean over the images that count, detached, a scalar; 0 where none does."""
        return self.per_image.sum() / self.images.clamp(min=1e-6)

    def sums(self) -> dict:
        """Returns what is summed up by name for the next log, see [`Sums`]."""
        counts = {"nonfinite": self.nonfinite, "blank": self.blank, "views": self.views}
        return {"loss": self.per_image.sum(), "images": self.images, **counts}


class FeedbackLoss:
    """
    How well visual tokens explain their pictures (DEEM, https://arxiv.org/abs/2405.15232, Eq. 5), image by image.

    A view whose loss or gradient is not finite is left out, on the device, without a synchronisation.

    Args:
        diffusion_model (`DiffusionModel`): Encodes pictures to latents, and denoises them.
        objective (`Callable`): `(latents, context, *, generator, ...) -> (views,)`, a [`DiffusionFeedback`].
        condition (`ConditionConfig`): Which tokens the denoiser is shown.
        eyes (`Eyes`, *optional*): Show a second view to the tower, for objectives that compare two.
        max_views_per_image (`int`, *optional*): As in [`FeedbackConfig`].
    """

    def __init__(
        self,
        diffusion_model,
        objective,
        condition: ConditionConfig,
        eyes: Eyes | None = None,
        max_views_per_image: int | None = None,
    ):
        self.diffusion_model = diffusion_model
        self.objective = objective
        self.condition = condition
        self.eyes = eyes
        self.max_views_per_image = max_views_per_image

    @property
    def is_frozen(self) -> bool:
        """Whether the conditions are all that the objective has a gradient for."""
        # A synchroniser, which shows the denoiser maps, trains within it.
        denoiser = getattr(self.objective, "denoiser", None)
        if not isinstance(denoiser, Denoiser) or self.condition.shows_maps:
            return False
        return not any(parameter.requires_grad for parameter in denoiser.model.parameters())

    def __call__(
        self,
        views: list[View],
        conditioner,
        generator,
        *,
        scale=1.0,
        latents=None,
        on_nonfinite=None,
        **drawn,
    ) -> ImageLosses:
        """
        Computes the losses of views, at least one.

        Args:
            views (`list[View]`): See above.
            conditioner (`Conditioner`): Makes the denoiser's context.
            generator (`torch.Generator`): Draws views, latents, noise and timesteps; on the tokens' device. None draws
                from the global one.
            scale (`float`, *optional*, defaults to 1): As in [`early_gradient`], of `total`.
            latents (`torch.Tensor`, *optional*): Of what must be restored, where it is encoded already, `(views,
                channels, h, w)`.
            on_nonfinite (`Callable`, *optional*): Is given, in the backward pass, the number of views whose gradient
                turns out not to be finite there, where the denoiser trains.
            drawn: What the objective need not draw, such as the `noise` and `timesteps` of a [`DiffusionFeedback`].

        Raises:
            ValueError: If latents are given for views that are drawn.
        """
        given = len(views)
        views = sample_views(views, self.max_views_per_image, generator)
        if latents is not None and not given == len(views) == len(latents):
            raise ValueError(
                f"Got latents of {len(latents)} pictures for {given} views, of which `max_views_per_image` keeps "
                f"{len(views)}. Give one for each, and leave `max_views_per_image` out."
            )
        latents, mask = self.encode(views, generator, latents)
        conditions = condition_of(views, self.condition, conditioner, generator)
        extra = drawn if mask is None else {**drawn, "mask": mask}
        if hasattr(self.objective, "second_views"):
            again = self.objective.second_views(views, self.eyes, generator)
            conditions += condition_of(again, self.condition, conditioner, generator)

        def errors_of(context, vector, *second_view):
            options = extra if vector is None else {**extra, "vector": vector}
            if second_view:
                options = {**options, "second_view": second_view}
            with attached_maps(views, self.condition, conditioner, self.objective):
                return self.objective(latents, context, generator=generator, **options)

        blank = torch.stack([_shows_nothing(view) for view in views])
        weights = torch.tensor([view.weight for view in views], device=blank.device) * ~blank
        if self.is_frozen:
            total, errors, finite = early_gradient(errors_of, weights, scale, *conditions)
        else:
            gate = FiniteGate(on_nonfinite)
            errors = errors_of(*map(gate.through, conditions))
            finite = gate.finite = errors.isfinite()
            total = (torch.where(finite, errors, 0.0) * weights).sum()
        return summarise(views, total, errors.detach(), finite | blank, blank, weights)

    def of_none(self, views: list[View], conditioner, generator) -> torch.Tensor:
        """
        Returns 0 with the graph of a call whose images were not drawn, a scalar: the conditioner gets a gradient, for
        which ranks that drew some would wait (DDP, FSDP).
        """
        conditions = condition_of(views[:1], self.condition, conditioner, generator)
        return sum(0.0 * value.float().sum() for value in conditions if value is not None)

    @torch.no_grad()
    def encode(self, views: list[View], generator=None, latents=None):
        """
        Returns the latents of views `(views, channels, h, w)`, unless they are given, and which of their cells count
        `(views, 1, h, w)`, None where all do. Pictures that are no squares lie in a letterbox.
        """
        model = self.diffusion_model
        device = views[0].tokens.device
        model.to(device)
        fitted = [fit(view.picture.clamp(0, 1), view.mask, model.image_size) for view in views]
        if latents is None and model.latent_cache is None:
            latents = model.encode(torch.cat([picture for picture, _ in fitted]).to(device), generator=generator)
        elif latents is None:
            # Known by the picture as the tower saw it.
            posteriors = [model.posterior(view.picture.clamp(0, 1)[None]) for view in views]
            means, deviations = zip(*posteriors, strict=True)
            deviations = None if deviations[0] is None else torch.cat(deviations)
            latents = model.codec.draw(torch.cat(means), deviations, generator=generator)
        return latents, latent_mask([mask for _, mask in fitted], latents.shape[-2:], device)


def _shows_nothing(view):
    """Tells whether a view has nothing to be restored: one colour, or no place that counts; bool, `()`."""
    blank = is_blank(view.picture)
    return blank if view.mask is None else blank | ~view.mask.any()


def with_targets(views, targets):
    """
    Gives views other pictures to be restored, `(views, 3, height, width)` in [0, 1]; raises a `ValueError` if there is
    not one for each.
    """
    if len(targets) != len(views):
        raise ValueError(
            f"The batch holds {len(targets)} `target_pixel_values` for {len(views)} pictures; expected one target a "
            f"picture, in [-1, 1]."
        )
    return [replace(view, picture=target, mask=None) for view, target in zip(views, targets, strict=True)]


def summarise(views, total, errors, finite, blank, weights) -> ImageLosses:
    images = list(dict.fromkeys(view.image for view in views))
    index = torch.tensor([images.index(view.image) for view in views], device=errors.device)
    kept = torch.where(finite & ~blank, errors.float(), 0.0) * weights
    zeros = torch.zeros(len(images), device=errors.device)
    counted = zeros.index_add(0, index, (finite & ~blank).float()) > 0
    shares = torch.tensor([view.weight for view in views], device=errors.device)
    return ImageLosses(
        total=total,
        per_image=zeros.index_add(0, index, kept),
        counted=counted,
        images=(zeros.index_add(0, index, shares) * counted).sum(),
        nonfinite=(~finite).sum(),
        blank=blank.sum(),
        views=len(views),
    )
