"""PerceiverResampler: any number of image tokens becomes a fixed number of queries."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

# The Q-Former's value. Far below the usual 1e-5, so it matters for parity with checkpoints of the official code.
LAYER_NORM_EPS = 1e-12


class ResamplerAttention(nn.Module):
    """
    Multi-head attention of queries to tokens of width `context_dim`, with optional QK normalisation (a LayerNorm over
    each head), followed by the residual sum and a norm (post-norm). `num_heads` must divide `hidden_dim`.
    """

    def __init__(self, hidden_dim: int, context_dim: int, num_heads: int, qk_norm: bool):
        super().__init__()
        head_dim = hidden_dim // num_heads
        self.num_heads = num_heads
        self.query = nn.Linear(hidden_dim, hidden_dim)
        self.key = nn.Linear(context_dim, hidden_dim)
        self.value = nn.Linear(context_dim, hidden_dim)
        self.q_norm = nn.LayerNorm(head_dim, eps=LAYER_NORM_EPS) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim, eps=LAYER_NORM_EPS) if qk_norm else nn.Identity()
        self.out = nn.Linear(hidden_dim, hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim, eps=LAYER_NORM_EPS)

    def forward(self, queries, context, attention_mask=None):
        """
        Updates queries `(batch, queries, hidden_dim)` from `context` `(batch, tokens, context_dim)`; a boolean mask
        `(batch, 1, 1, tokens)` says which tokens may be attended to.
        """

        def heads(x):
            """Splits `(batch, tokens, dim)` into `(batch, heads, tokens, head_dim)`."""
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        attended = F.scaled_dot_product_attention(
            self.q_norm(heads(self.query(queries))),
            self.k_norm(heads(self.key(context))),
            heads(self.value(context)),
            attn_mask=attention_mask,
        )
        attended = self.out(attended.transpose(1, 2).flatten(2))
        return self.norm(queries + attended)


class ResamplerFeedForward(nn.Module):
    """Two linear layers with GELU, followed by the residual sum and a norm."""

    def __init__(self, hidden_dim: int, intermediate_dim: int):
        super().__init__()
        self.up = nn.Linear(hidden_dim, intermediate_dim)
        self.down = nn.Linear(intermediate_dim, hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim, eps=LAYER_NORM_EPS)

    def forward(self, queries):
        """Maps `(batch, queries, hidden_dim)` to the same shape."""
        update = self.down(F.gelu(self.up(queries)))
        return self.norm(queries + update)


class ResamplerLayer(GradientCheckpointingLayer):
    """Self-attention among the queries, cross-attention to the image tokens where the layer has it, feed-forward."""

    def __init__(self, hidden_dim, input_dim, num_heads, intermediate_dim, cross_attention, qk_norm):
        super().__init__()
        self.self_attention = ResamplerAttention(hidden_dim, hidden_dim, num_heads, qk_norm)
        self.cross_attention = (
            ResamplerAttention(hidden_dim, input_dim, num_heads, qk_norm) if cross_attention else None
        )
        self.feed_forward = ResamplerFeedForward(hidden_dim, intermediate_dim)

    def forward(self, queries, tokens, attention_mask=None):
        """Updates `queries` `(batch, queries, hidden_dim)` from `tokens` `(batch, tokens, input_dim)`."""
        queries = self.self_attention(queries, queries)
        if self.cross_attention is not None:
            queries = self.cross_attention(queries, tokens, attention_mask)
        return self.feed_forward(queries)


class PerceiverResampler(nn.Module):
    """
    Reads any number of tokens with a fixed number of learned queries.

    This is the BLIP-2 Q-Former (https://arxiv.org/abs/2301.12597, Sec. 3.1) without text, with queries and keys
    normalised per head, as DEEM has it behind the encoder (https://arxiv.org/abs/2405.15232, Sec. 2.1). The defaults
    are the paper's shape.

    Args:
        input_dim (`int`): Width of the tokens that are read.
        hidden_dim (`int`, *optional*, defaults to 768): Width of the queries and of the output.
        num_queries (`int`, *optional*, defaults to 77): Number of queries, the length of Stable Diffusion's text
            context.
        num_layers (`int`, *optional*, defaults to 12): Number of layers.
        num_heads (`int`, *optional*, defaults to 12): Number of attention heads; must divide `hidden_dim`.
        intermediate_dim (`int`, *optional*): Width inside the feed-forward. Defaults to four times `hidden_dim`.
        cross_attention_frequency (`int`, *optional*, defaults to 2): Layers 0, n, 2n, ... read the tokens; the others
            only mix the queries.
        qk_norm (`bool`, *optional*, defaults to `True`): Whether queries and keys are normalised per head.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int = 768,
        num_queries: int = 77,
        num_layers: int = 12,
        num_heads: int = 12,
        intermediate_dim: int | None = None,
        cross_attention_frequency: int = 2,
        qk_norm: bool = True,
    ):
        super().__init__()
        if hidden_dim % num_heads:
            raise ValueError(
                f"The resampler's width must be a multiple of its number of heads, got hidden_dim={hidden_dim} and "
                f"num_heads={num_heads}. Choose a `num_heads` that divides {hidden_dim}."
            )
        self.queries = nn.Parameter(torch.zeros(1, num_queries, hidden_dim))
        self.norm = nn.LayerNorm(hidden_dim, eps=LAYER_NORM_EPS)
        self.layers = nn.ModuleList(
            ResamplerLayer(
                hidden_dim,
                input_dim,
                num_heads,
                intermediate_dim or 4 * hidden_dim,
                cross_attention=index % cross_attention_frequency == 0,
                qk_norm=qk_norm,
            )
            for index in range(num_layers)
        )
        nn.init.normal_(self.queries, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Reads tokens `(batch, tokens, input_dim)`, as queries `(batch, num_queries, hidden_dim)`.

        Args:
            tokens (`torch.Tensor`): See above.
            attention_mask (`torch.Tensor`, *optional*): Shape `(batch, tokens)`, nonzero where a token counts; in
                every row at least one.
        """
        if attention_mask is not None:
            attention_mask = attention_mask.bool()[:, None, None, :]  # broadcast over heads and queries
        queries = self.norm(self.queries).expand(len(tokens), -1, -1)
        for layer in self.layers:
            queries = layer(queries, tokens, attention_mask)
        return queries
