"""Visual tokens to the context of a denoiser: the one learned part of the feedback."""

import torch
from torch import nn

from ..vision.resampler import PerceiverResampler


class Conditioner(nn.Module):
    """
    Makes the denoiser's context of a picture's visual tokens.

    Patch tokens, as a stock VLM has them, go through a small perceiver resampler and a linear head. Queries that a
    DEEM tower has resampled already go through the head alone; it is the `proj_i` of the official code.

    Args:
        input_dim (`int`): Width of the visual tokens.
        context_dim (`int`): Width of the denoiser's context.
        num_queries (`int`, *optional*, defaults to `0`): Queries of the resampler; `0` for the head alone.
        resampler_dim, resampler_layers, resampler_heads (`int`, *optional*): Shape of the resampler.
    """

    def __init__(
        self, input_dim, context_dim, num_queries=0, resampler_dim=768, resampler_layers=2, resampler_heads=12
    ):
        super().__init__()
        self.arguments = {
            "input_dim": input_dim,
            "context_dim": context_dim,
            "num_queries": num_queries,
            "resampler_dim": resampler_dim,
            "resampler_layers": resampler_layers,
            "resampler_heads": resampler_heads,
        }
        self.resampler = None
        if num_queries:
            self.resampler = PerceiverResampler(
                input_dim,
                hidden_dim=resampler_dim,
                num_queries=num_queries,
                num_layers=resampler_layers,
                num_heads=resampler_heads,
            )
        self.head = nn.Linear(resampler_dim if num_queries else input_dim, context_dim)
        # As in the official code: the condition starts near zero, so that the first feedback is a whisper.
        nn.init.normal_(self.head.weight, std=1e-3)
        nn.init.zeros_(self.head.bias)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return self.head.weight.dtype

    def forward(self, tokens, token_mask=None):
        """
        Args:
            tokens (`torch.Tensor`): Visual tokens, shape `(batch, tokens, input_dim)`.
            token_mask (`torch.Tensor`, *optional*): True where a token counts, shape `(batch, tokens)`. Pictures of
                one batch may have different numbers of tokens only where there is a resampler.

        Returns:
            `torch.Tensor`: Context, shape `(batch, queries, context_dim)`.
        """
        tokens = tokens.to(self.dtype)
        if self.resampler is None:
            if token_mask is not None and not token_mask.all():
                raise ValueError(
                    "The pictures of this batch have different numbers of visual tokens, and the conditioner has no "
                    "resampler that could even them out. Set `feedback.num_queries` above 0."
                )
            return self.head(tokens)
        return self.head(self.resampler(tokens, token_mask))
