"""The interleaved model with the defects of DEEM's published code, which its published figures were made with."""

from dataclasses import replace

import torch

from deem_plugin.models.deem import DeemForConditionalGeneration
from deem_plugin.models.denoising import DenoisingHeads
from deem_plugin.models.interleaving import image_places


class PublishedHeads(DenoisingHeads):
    """The next image is restored from pictures that were normalised to [-1, 1] twice, to [-3, 1]."""

    def image_loss(self, batch, draws, generator=None):
        """As [`DenoisingHeads`]."""
        return super().image_loss(replace(batch, pictures=batch.pictures * 2 - 1, posterior=None), draws, generator)


class PublishedDeem(DeemForConditionalGeneration):
    """
    The model as published, beside [`PublishedHeads`]: both denoising losses are divided by all pictures, so that one
    among many teaches less and those that do not count make the next image cheaper; and packed documents read each
    other's text, while their pictures are hidden from each other.

    Args:
        config (`DeemConfig`): As of any DEEM.
    """

    def __init__(self, config, **parts):
        super().__init__(config, **parts)
        self.denoising = PublishedHeads(config)
        self.post_init()

    def totals_of(self, inputs):
        """Counts all pictures, for both losses."""
        rows, _ = image_places(inputs["input_ids"], self.config.image_start_token_id)
        return torch.tensor([len(rows), len(rows)], device=rows.device)

    def forward(self, input_ids, attention_mask=None, **inputs):
        """As [`DeemForConditionalGeneration`]."""

        def read_all(module, args, kwargs):
            return args, kwargs | {"attention_mask": attention_mask, "position_ids": None}

        hook = self.language_model.register_forward_pre_hook(read_all, with_kwargs=True)
        try:
            return super().forward(input_ids, attention_mask, **inputs)
        finally:
            hook.remove()
