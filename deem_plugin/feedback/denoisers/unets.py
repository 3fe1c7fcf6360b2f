"""Stable Diffusion's UNets: 1.x, 2.x and XL."""

import torch

from .base import Denoiser

# The conditions of SDXL: height and width of the original, top and left of the crop, height and width of the target.
SDXL_TIME_IDS = 6


class UNetDenoiser(Denoiser):
    """
    Stable Diffusion 1.x, 2.x and XL (`UNet2DConditionModel`).

    XL is also told sizes and a pooled text embedding (https://arxiv.org/abs/2307.01952, Sec. 2.2). It is told that the
    picture was never resized nor cropped, and the zeros that stand for an empty prompt in its own pipeline.
    """

    def __init__(self, model, scheduler, downscale=8):
        super().__init__(model, scheduler, downscale)
        if model.config.addition_embed_type not in (None, "text_time"):
            raise ValueError(
                f"The UNet asks for extra conditions (addition_embed_type={model.config.addition_embed_type!r}). "
                f"Known UNets are those of Stable Diffusion 1.x and 2.x (None) and XL ('text_time')."
            )
        if model.config.class_embed_type is not None:
            raise ValueError(
                f"The UNet asks for an embedding of a class or of an image, as unCLIP's do (class_embed_type="
                f"{model.config.class_embed_type!r}). Known UNets are those of Stable Diffusion 1.x, 2.x and XL."
            )
        if not isinstance(model.config.cross_attention_dim, int):
            raise ValueError(
                f"The UNet has a different context width in each block ({model.config.cross_attention_dim}); "
                f"expected one width."
            )

    @property
    def context_dim(self) -> int:
        """Width of the text states that the UNet was trained on: 768 (SD 1.x), 1024 (SD 2.x) or 2048 (XL)."""
        return self.model.config.cross_attention_dim

    @property
    def vector_dim(self) -> int:
        """Width of XL's pooled text embedding, 1280; 0 for 1.x and 2.x."""
        config = self.model.config
        if config.addition_embed_type is None:
            return 0
        return config.projection_class_embeddings_input_dim - SDXL_TIME_IDS * config.addition_time_embed_dim

    def _predict(self, noisy_latents, times, context, vector=None):
        conditions = None
        if vector is not None:
            size = self._picture_size(noisy_latents)
            conditions = {
                "text_embeds": vector,
                "time_ids": torch.cat([size, torch.zeros_like(size), size], dim=1),
            }
        return self.model(noisy_latents, times, encoder_hidden_states=context, added_cond_kwargs=conditions).sample
