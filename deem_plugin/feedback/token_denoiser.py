"""ROSS's denoiser: it restores a picture's latents token by token from what a language model says of each token."""

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed
from torch import nn

from .denoisers.transformers import pack, unpack
from .processes import forward_process

TIME_DIM = 256


class TokenDenoiser(nn.Module):
    """
    A diffusion transformer in which each visual token modulates its own block of the latents (ROSS,
    https://arxiv.org/abs/2410.09575).

    Unlike the frozen denoisers it is new and trains with the model, and like the conditioner it is left behind when
    the model is saved. All modulations and the output start at zero, as in DiT's adaLN-zero.

    Args:
        token_dim (`int`): Width of the language model's hidden states.
        channels (`int`): Values in a token's block of latents.
        width, layers, heads (`int`, *optional*): Its shape; ROSS's by default.
    """

    def __init__(self, token_dim, channels, width=1024, layers=3, heads=16):
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.arguments = arguments  # what a checkpoint needs to make it again
        self.norm = nn.LayerNorm(token_dim, elementwise_affine=False)
        self.read_token = nn.Linear(token_dim, width)
        self.read_latents = nn.Linear(channels, width)
        self.frequencies = Timesteps(TIME_DIM, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = TimestepEmbedding(TIME_DIM, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.last_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.last_modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, channels)
        nn.init.normal_(self.read_token.weight, std=0.02)
        for module in (*(block.modulation for block in self.blocks), self.last_modulation, self.output):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return self.output.weight.dtype

    def forward(self, noisy, timesteps, tokens, grid):
        """
        Predicts the noise in latents `(batch, tokens, channels)`, a block a token, at timesteps `(batch,)` from the
        language model's hidden states `(batch, tokens, token_dim)`, which lie in a `grid` of rows and columns.
        """
        time = self.time(self.frequencies(timesteps).to(self.dtype))
        condition = time[:, None] + self.read_token(nn.functional.silu(self.norm(tokens.to(self.dtype))))
        condition = nn.functional.silu(condition)
        positions = get_2d_sincos_pos_embed(self.arguments["width"], grid, output_type="pt", device=noisy.device)
        hidden = self.read_latents(noisy.to(self.dtype)) + positions.to(self.dtype)
        for block in self.blocks:
            hidden = block(hidden, condition)
        shift, scale = self.last_modulation(condition).chunk(2, dim=-1)
        return self.output(self.last_norm(hidden) * (1 + scale) + shift)


class _Block(nn.Module):
    """A transformer block, each token of which has its own shift, scale and gate."""

    def __init__(self, width, heads):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, heads=heads, dim_head=width // heads, bias=True)
        self.mlp_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = FeedForward(width, mult=4, activation_fn="gelu-approximate")
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, hidden, condition):
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(condition).chunk(6, dim=-1)
        hidden = hidden + gate * self.attention(self.attention_norm(hidden) * (1 + scale) + shift)
        return hidden + mlp_gate * self.mlp(self.mlp_norm(hidden) * (1 + mlp_scale) + mlp_shift)


class TokenBlocks:
    """
    Makes a [`TokenDenoiser`] look like a denoiser, for [`DiffusionFeedback`]: latents in, latents out.

    The process is ROSS's: DDPM with the cosine schedule (https://arxiv.org/abs/2102.09672), predicting the noise.

    Args:
        network (`Callable`): Returns the [`TokenDenoiser`]; asked at each call, since wrappers may replace it.
        context_dim (`int`): Width of the language model's hidden states.
        cells (`int`): Latent cells of a token along each side.
    """

    vector_dim = 0

    def __init__(self, network, context_dim, cells=2):
        from diffusers import DDPMScheduler

        self.network = network
        self.context_dim = context_dim
        self.cells = cells
        self.process = forward_process(DDPMScheduler(beta_schedule="squaredcos_cap_v2"))

    def __call__(self, noisy_latents, timesteps, context, vector=None):
        """Predicts the noise in latents `(batch, channels, rows * cells, columns * cells)`."""
        height, width = noisy_latents.shape[-2:]
        grid = height // self.cells, width // self.cells
        predicted = self.network()(pack(noisy_latents, self.cells), timesteps, context, grid)
        return unpack(predicted, height, width, self.cells)
