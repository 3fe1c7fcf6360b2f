"""Feedback at the language model's own outputs (ROSS, https://arxiv.org/abs/2410.09575)."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from ..vision.patches import deal_out
from ..vision.views import View, sample_views
from .finite import FiniteGate
from .hook import check_range
from .loss import ImageLosses, summarise

# How much wider than high, or higher than wide, a token's block of a picture may be.
MOST_UNEVEN = 2.5


class DecoderSource:
    """
    Where ROSS's feedback is read and injected: at what the language model (`decoder`) says at the places of a
    picture's tokens, after its last norm.

    Places are found by the ids of the tokens, so that padding on either side, several pictures in a row and rows of
    text alone are all the same to it. Pictures are those of the tower's call; each gets the places that its share of
    the tower's tokens became.
    """

    def __init__(self, eyes, decoder):
        self.eyes = eyes
        self.module = decoder
        # The views of the batch that the model reads at the moment.
        self._batch, self._pictures = None, []

    def register(self, hook):
        """Returns the handle of a hook that remembers the pictures of each call of the tower."""

        def note(module, args, kwargs, output):
            inputs = self.eyes.call_arguments(args, kwargs)
            with torch.no_grad():
                views = self.eyes.views(inputs, output, hook.state.model_inputs)
            if self._batch is not hook.state.model_inputs:
                self._batch, self._pictures = hook.state.model_inputs, []
            # Of a second call in a forward the views come behind those of the first.
            self._pictures += [replace(view, tokens=view.tokens.detach()) for view in views]

        return [self.eyes.tower.register_forward_hook(note, with_kwargs=True)]

    def views(self, args, kwargs, output, state):
        """Returns the hidden states of each picture's tokens; none for text alone."""
        pictures, batch = self._pictures, self._batch
        self._batch, self._pictures = None, []
        if not pictures or batch is not state.model_inputs:
            return []
        ids = state.model_inputs.get("input_ids")
        if ids is None or self.eyes.image_token_id is None:
            raise ValueError(
                "ROSS's feedback finds a picture's tokens by `input_ids`, and this batch came without (as "
                "`inputs_embeds`). Give the model `input_ids`, or use a `FeedbackConfig`, which reads the tower."
            )
        states = output.last_hidden_state[(ids == self.eyes.image_token_id).to(output.last_hidden_state.device)]
        counts = [len(view.tokens) for view in pictures]
        try:
            pieces = deal_out(states, counts, f"of the vision tower, {counts[:8]} for each picture")
        except ValueError as error:
            raise ValueError(
                f"The batch has {len(states)} image tokens, and its {len(pictures)} pictures have {counts[:8]} tokens "
                f"of the vision tower. ROSS's feedback expects as many tokens of the language model for each token of "
                f"the tower: models that write separators between rows or tiles are not known."
            ) from error
        return [
            replace(view, tokens=own, positions=None, pooled=None, maps=None)
            for view, own in zip(pictures, pieces, strict=True)
        ]

    def inject(self, output, through):
        """Replaces the language model's last hidden states by what `through` returns of them."""
        output["last_hidden_state"] = through(output.last_hidden_state)
        return output

    def check(self, views):
        """As [`TowerSource.check`]: the pictures lie in [0, 1]."""
        check_range(views)


class RossLoss:
    """
    How well a small denoiser that trains along restores each token's own block of the picture.

    Args:
        autoencoder (`DiffusionModel`): Encodes pictures to latents.
        objective (`DiffusionFeedback`): On [`TokenBlocks`].
        cells (`int`): Latent cells of a token along each side.
    """

    def __init__(self, autoencoder, objective, cells):
        self.diffusion_model = autoencoder
        self.objective = objective
        self.cells = cells

    # The denoiser trains with the model, so its activations are needed in the backward pass.
    is_frozen = False

    def __call__(self, views: list[View], denoiser, generator, *, scale=1.0, on_nonfinite=None) -> ImageLosses:
        """As [`FeedbackLoss`]; `denoiser` is the [`TokenDenoiser`]. Pictures of one size are restored together."""
        views = sample_views(views, None)
        groups: dict[tuple[int, int], list[int]] = {}
        for index, view in enumerate(views):
            groups.setdefault(grid_of(view), []).append(index)
        errors = [None] * len(views)
        for grid, members in groups.items():
            latents = self._latents([views[index].picture for index in members], grid, generator)
            gate = FiniteGate(on_nonfinite)
            context = gate.through(torch.stack([views[index].tokens for index in members]))
            own = self.objective(latents, context, generator=generator)
            gate.finite = own.isfinite()
            for index, error in zip(members, own, strict=True):
                errors[index] = error
        errors = torch.stack(errors)
        finite = errors.isfinite()
        weights = torch.tensor([view.weight for view in views], device=errors.device)
        total = (torch.where(finite, errors, 0.0) * weights).sum()
        return summarise(views, total, errors.detach(), finite, torch.zeros_like(finite), weights)

    @torch.no_grad()
    def _latents(self, pictures, grid, generator):
        side = self.cells * self.diffusion_model.codec.downscale
        size = tuple(length * side for length in grid)
        device = generator.device
        # Whole pictures: each token answers for its own place, and there is none in a letterbox.
        resized = [
            F.interpolate(picture.clamp(0, 1)[None].to(device), size, mode="bicubic", antialias=True).clamp(0, 1)
            for picture in pictures
        ]
        self.diffusion_model.to(device)
        return self.diffusion_model.codec.encode(torch.cat(resized) * 2 - 1, generator=generator)


def grid_of(view: View) -> tuple[int, int]:
    """
    Returns rows and columns of a view's tokens: the grid nearest to the proportions of its picture; raises a
    `ValueError` if they make none.
    """
    count, (height, width) = len(view.tokens), view.picture.shape[-2:]
    grids = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    rows, columns = min(grids, key=lambda grid: abs(math.log(grid[0] * width / (grid[1] * height))))
    if not 1 / MOST_UNEVEN <= rows * width / (columns * height) <= MOST_UNEVEN:
        raise ValueError(
            f"The language model reads {count} tokens of a picture of {height} x {width} pixels, which are no grid in "
            f"its proportions. ROSS's feedback asks each token for its own block of the picture: use a tower without "
            f"a class token, and a model without separators."
        )
    return rows, columns
