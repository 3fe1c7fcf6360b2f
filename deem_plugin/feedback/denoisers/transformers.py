"""Diffusion transformers: PixArt, and those of flow matching (SD3, FLUX.1, Sana, Lumina 2, AuraFlow)."""

import torch

from .base import Denoiser, FlowDenoiser


class PixArtDenoiser(Denoiser):
    """
    PixArt's cross-attention diffusion transformer (`PixArtTransformer2DModel`), alpha and sigma.

    The 1024-pixel alpha is also told the picture's size and aspect ratio: those of the latents.
    """

    @property
    def context_dim(self) -> int:
        """Width of the caption states that the transformer projects: 4096 (T5)."""
        return self.model.config.caption_channels

    def _predict(self, noisy_latents, times, context):
        conditions = {"resolution": None, "aspect_ratio": None}
        if self.model.use_additional_conditions:
            size = self._picture_size(noisy_latents)
            conditions = {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}
        prediction = self.model(
            noisy_latents, encoder_hidden_states=context, timestep=times, added_cond_kwargs=conditions
        ).sample
        # The published weights also predict a variance, in the second half of the channels.
        return prediction[:, : self.channels]


class JointAttentionDenoiser(FlowDenoiser):
    """A flow network that attends to text states, and is modulated by a pooled text embedding where it has one."""

    @property
    def context_dim(self) -> int:
        """Width of the text states: 4096 (T5; SD3, FLUX), 2048 (AuraFlow)."""
        return self.model.config.joint_attention_dim

    @property
    def vector_dim(self) -> int:
        """Width of the pooled CLIP embedding: 2048 (SD3), 768 (FLUX), 0 (AuraFlow)."""
        return self.model.config.get("pooled_projection_dim", 0)


class SD3Denoiser(JointAttentionDenoiser):
    """
    Stable Diffusion 3 and 3.5 (`SD3Transformer2DModel`, https://arxiv.org/abs/2403.03206).

    Without a vector the pooled text embedding is zeros, as wherever its CLIP encoders were dropped in training.
    """

    def _predict(self, noisy_latents, times, context, vector):
        return self.model(
            noisy_latents, encoder_hidden_states=context, pooled_projections=vector, timestep=times
        ).sample


def pack(latents, side=2):
    """Returns latents `(batch, c, h, w)` as tokens of `side^2` cells, `(batch, tokens, c side^2)`, in FLUX's order."""
    cells = latents.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (batch, c, rows, side, columns, side)
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens, height, width, side=2):
    """Undoes [`pack`]: tokens to latents `(batch, c, height, width)`."""
    cells = tokens.unflatten(2, (-1, side, side)).unflatten(1, (height // side, width // side))
    return cells.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


class FluxDenoiser(JointAttentionDenoiser):
    """
    FLUX.1 dev and schnell (`FluxTransformer2DModel`): tokens of 2 x 2 latent cells, positions beside them.

    Without a vector the pooled CLIP embedding is zeros. Dev, whose guidance was distilled into an input, is told 1: no
    guidance, the scale at which the velocity of the data is the right answer.
    """

    @property
    def sample_size(self) -> int:
        """128 cells, FLUX's own default of 1024 pixels; one that we have trained says its size."""
        return self.model.config.get("sample_size", 128)

    @property
    def channels(self) -> int:
        """Channels of the unpacked latents: 16."""
        return self.model.config.in_channels // 4

    def _predict(self, noisy_latents, times, context, vector):
        height, width = noisy_latents.shape[-2:]
        guidance = None
        if self.model.config.guidance_embeds:
            guidance = torch.ones(len(context), device=context.device)
        prediction = self.model(
            pack(noisy_latents),
            encoder_hidden_states=context,
            pooled_projections=vector,
            timestep=self._sigma(times),  # the network multiplies by 1000 itself
            img_ids=self._positions(height // 2, width // 2, context),
            txt_ids=context.new_zeros(context.shape[1], 3),
            guidance=guidance,
        ).sample
        return unpack(prediction, height, width)

    @staticmethod
    def _positions(rows, columns, like):
        """Returns `(0, row, column)` of each image token, shape `(rows * columns, 3)`, dtype and device of `like`."""
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        return torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1).to(like)


class SanaDenoiser(FlowDenoiser):
    """Sana's linear-attention transformer (`SanaTransformer2DModel`, https://arxiv.org/abs/2410.10629)."""

    def __init__(self, model, scheduler, downscale=32):
        super().__init__(model, scheduler, downscale)
        if model.config.guidance_embeds:
            raise ValueError(
                "The Sana transformer has an embedded guidance scale (Sana-Sprint), whose process is not plain flow "
                "matching. Expected Sana without `guidance_embeds`."
            )

    @property
    def context_dim(self) -> int:
        """Width of the Gemma states that the transformer projects: 2304."""
        return self.model.config.caption_channels

    def _predict(self, noisy_latents, times, context):
        scaled = times * self.model.config.timestep_scale
        return self.model(noisy_latents, encoder_hidden_states=context, timestep=scaled).sample


class Lumina2Denoiser(FlowDenoiser):
    """
    Lumina-Image 2.0 (`Lumina2Transformer2DModel`, https://arxiv.org/abs/2503.21758).

    Its time runs from noise (0) to picture (1) and its velocity points to the picture; both are turned round here.
    """

    @property
    def context_dim(self) -> int:
        """Width of the Gemma states that the transformer projects: 2304."""
        return self.model.config.cap_feat_dim

    def _predict(self, noisy_latents, times, context):
        longest = self.model.config.axes_lens[0] - 1
        if context.shape[1] > longest:
            raise ValueError(
                f"The context has {context.shape[1]} tokens, but this Lumina 2 has positions for {longest} at most. "
                f"Set `feedback.condition.num_queries` to {longest} or less."
            )
        everything = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
        return -self.model(
            noisy_latents,
            timestep=1 - self._sigma(times),
            encoder_hidden_states=context,
            encoder_attention_mask=everything,
        ).sample


class AuraFlowDenoiser(JointAttentionDenoiser):
    """AuraFlow (`AuraFlowTransformer2DModel`), which is told the time in (0, 1], noise at 1."""

    def _predict(self, noisy_latents, times, context):
        return self.model(noisy_latents, encoder_hidden_states=context, timestep=self._sigma(times)).sample
