"""ImageDecoder: what a language model has read before a picture becomes the context that draws it."""

import torch
from torch import nn

from ..vision.grids import sincos_positions
from ..vision.resampler import PerceiverResampler


class ImageDecoder(nn.Module):
    """
    Turns the states of a language model into the context of a denoiser (DEEM, Sec. 2.1, "image decoder").

    The states come nearest first, so that a position means a distance from the picture, however long the text is.

    Args:
        config (`DeemConfig`): Reads its widths and what begins with `image_decoder`.
    """

    def __init__(self, config):
        super().__init__()
        width, num_queries = config.text_config.hidden_size, config.vision_config.num_image_tokens
        self.projection = nn.Linear(width, width)
        self.resampler = PerceiverResampler(
            width,
            hidden_dim=config.context_dim,
            num_queries=num_queries,
            num_layers=config.image_decoder_layers,
            num_heads=config.image_decoder_heads,
            intermediate_dim=config.image_decoder_intermediate_size,
            qk_norm=False,
        )
        # What stands for "no text" in classifier-free guidance (https://arxiv.org/abs/2207.12598). The official code
        # starts it at the text encoder's embedding of the empty prompt, which only Stable Diffusion has.
        self.null_context = nn.Parameter(torch.empty(1, num_queries, config.context_dim))
        nn.init.normal_(self.null_context, std=0.02)

    def positioned(self, states):
        """Projects states `(images, tokens, hidden_dim)` and adds their distance from the picture."""
        projected = self.projection(states)
        positions = sincos_positions(states.shape[1], states.shape[2], device=states.device)
        return projected + positions.to(projected.dtype)

    def forward(self, states, mask=None):
        """
        Args:
            states (`torch.Tensor`): What stands before each picture, nearest first, `(images, tokens, hidden_dim)`.
            mask (`torch.Tensor`, *optional*): True where a token counts, `(images, tokens)`.

        Returns:
            `torch.Tensor`: Context, shape `(images, num_queries, context_dim)`.
        """
        return self.resampler(self.positioned(states), mask)

    def drop(self, context, dropped):
        """
        Replaces the context of some pictures by the null context, so that guidance has something to guide away from.

        Args:
            context (`torch.Tensor`): Shape `(images, num_queries, context_dim)`.
            dropped (`torch.Tensor`): True where the context is replaced, shape `(images,)`.
        """
        return torch.where(dropped[:, None, None], self.null_context.to(context.dtype), context)
