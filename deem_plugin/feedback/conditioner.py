"""Visual tokens to the context of a denoiser: the one learned part of the feedback."""

from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch import nn

from ..vision.resampler import PerceiverResampler
from .conditions import dense_maps
from .synchroniser import UNetSynchroniser

# Sines and cosines of a place: eight frequencies along each axis.
POSITION_DIM = 32


def fourier_features(positions):
    """Returns sines and cosines of positions in (0, 1), `(..., 2)`, at frequencies from pi to 128 pi: `(..., 32)`."""
    frequencies = torch.pi * 2.0 ** torch.arange(POSITION_DIM // 4, device=positions.device)
    angles = (positions.float()[..., None] * frequencies).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Conditioner(nn.Module):
    """
    Makes the denoiser's context of a picture's visual tokens.

    Patch tokens, as a stock VLM has them, go through a small perceiver resampler and a linear head. Queries that a
    DEEM tower has resampled already go through the head alone; it is the `proj_i` of the official code. A pooled
    vector goes through a small MLP instead, and a second one makes the vector by which some denoisers are modulated
    (GenHancer, https://arxiv.org/abs/2503.19480; DCR, https://arxiv.org/abs/2603.04803).

    Args:
        input_dim, context_dim (`int`): Width of the visual tokens and of the denoiser's context.
        num_queries (`int`, *optional*, defaults to `0`): Queries of the resampler; `0` for the head alone.
        resampler_dim, resampler_layers, resampler_heads (`int`, *optional*): Shape of the resampler.
        mlp (`bool`, *optional*, defaults to `False`): Whether the head is an MLP.
        vector_dim (`int`, *optional*, defaults to `0`): Width of the denoiser's vector; `0` for none.
        prompt_tokens (`int`, *optional*, defaults to `0`): Length of `prompt_states`; `0` for none.
        synchroniser (`dict`, *optional*): Arguments of a [`UNetSynchroniser`], under `"unet"` the config of its UNet;
            none without it.
        positions (`bool`, *optional*, defaults to `False`): Whether tokens are told their place in the picture: a
            tower with rotary positions leaves none in them.
    """

    def __init__(
        self,
        input_dim,
        context_dim,
        num_queries=0,
        resampler_dim=768,
        resampler_layers=2,
        resampler_heads=12,
        mlp=False,
        vector_dim=0,
        prompt_tokens=0,
        synchroniser=None,
        positions=False,
    ):
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.arguments = arguments  # what a checkpoint needs to make it again
        self.positions = nn.Linear(POSITION_DIM, input_dim) if positions else None
        self.resampler = None
        if num_queries:
            self.resampler = PerceiverResampler(
                input_dim,
                hidden_dim=resampler_dim,
                num_queries=num_queries,
                num_layers=resampler_layers,
                num_heads=resampler_heads,
            )
        width = resampler_dim if num_queries else input_dim
        if mlp:
            self.head = _mlp(width, context_dim)
        else:
            self.head = nn.Linear(width, context_dim)
            if not prompt_tokens:
                # As in the official code: the condition starts near zero, so that the first feedback is a whisper.
                # Beside a prompt, which is a condition by itself, it starts as torch draws it (DIVA): plain SGD would
                # hardly move it from there.
                nn.init.normal_(self.head.weight, std=1e-3)
                nn.init.zeros_(self.head.bias)
        self.vector_head = _mlp(input_dim, vector_dim) if vector_dim else None
        # States of a text that never changes, to which the visual tokens are added. They are saved with the weights,
        # so that nobody needs the text encoder again.
        self.register_buffer("prompt_states", torch.zeros(prompt_tokens, context_dim) if prompt_tokens else None)
        self.synchroniser = None
        if synchroniser is not None:
            options = dict(synchroniser)
            self.synchroniser = UNetSynchroniser(SimpleNamespace(**options.pop("unet")), **options)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return next(self.parameters()).dtype

    def forward(self, tokens, token_mask=None, positions=None):
        """
        Makes the context `(batch, queries, context_dim)` of tokens.

        Args:
            tokens (`torch.Tensor`): Visual tokens, shape `(batch, tokens, input_dim)`.
            token_mask (`torch.Tensor`, *optional*): True where a token counts, shape `(batch, tokens)`. Pictures of
                one batch may have different numbers of tokens only where there is a resampler.
            positions (`torch.Tensor`, *optional*): Row and column of each token as fractions of its picture, `(batch,
                tokens, 2)`; read where the conditioner was made with `positions`.
        """
        tokens = tokens.to(self.dtype)
        if self.positions is not None and positions is not None:
            tokens = tokens + self.positions(fourier_features(positions).to(self.dtype))
        if self.resampler is not None:
            tokens = self.resampler(tokens, token_mask)
        elif token_mask is not None and not token_mask.all():
            raise ValueError(
                "The pictures of this batch have different numbers of visual tokens, and the conditioner has no "
                "resampler that could even them out. Set `feedback.condition.num_queries` above 0 and "
                "`feedback.condition.kind` to queries."
            )
        context = self.head(tokens)
        return context if self.prompt_states is None else self._with_prompt(context)

    def vector(self, tokens):
        """Returns what modulates the denoiser, made of the tokens' mean, `(batch, vector_dim)`; or None."""
        return None if self.vector_head is None else self.vector_head(tokens.to(self.dtype).mean(dim=1))

    def attached_to(self, unet, views):
        """
        Returns a context in which `unet`, the denoiser's network, reads the [`dense_maps`] of views; without a
        synchroniser it does nothing.
        """
        if self.synchroniser is None:
            return nullcontext()
        maps = dense_maps(views)
        seen = maps[0].new_ones(len(maps[0]), 1)
        return self.synchroniser.attached(unet, [level[:, None] for level in maps], seen)

    def _with_prompt(self, context):
        """Adds the states of the prompt: by position, or, where the numbers of tokens differ, their mean (DIVA)."""
        states = self.prompt_states
        if context.shape[1] not in (1, len(states)):
            states = states.mean(dim=0, keepdim=True)
        return context + states


def _mlp(input_dim, output_dim):
    return nn.Sequential(
        nn.LayerNorm(input_dim), nn.Linear(input_dim, output_dim), nn.GELU(), nn.Linear(output_dim, output_dim)
    )
