"""Image features that are computed once for all questions about a picture."""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

# Types of model that turn each picture into one block of tokens by itself, and how they want the blocks handed over.
# A type belongs here when its features of a picture depend on no other picture of the batch and on nothing but its
# pixels. Those that cut pictures into tiles pad to the picture with the most tiles, so they are not here.
_HANDED_OVER = {"llava": list, "vipllava": torch.stack, "paligemma": torch.stack}
# What a processor returns of texts; anything else but the pixels says that a picture is more than its pixels.
_TEXT_INPUTS = {"input_ids", "attention_mask", "token_type_ids"}


class FeatureCache:
    """
    Keeps the latest features of pictures, known by their processed pixels, in bounded memory.

    Args:
        max_bytes (`int`): Bytes that all kept features may take; 0 keeps and shares none.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.bytes = 0
        self._features: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def share(self, model, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """
        Replaces the pixels in a model's inputs by their features, of which only unknown ones are computed.

        Inputs come back as they are where sharing is off, there is no picture, or it is not known to be exact: for
        other types of model, and for towers that need more than pixels (such as Pixtral's, `image_sizes`).

        Args:
            model (`PreTrainedModel` or `PeftModel`): The vision-language model.
            inputs (`Mapping`):
                What its processor returned; `pixel_values` are (images, channels, height, width) in the model's dtype.

        Returns:
            `Mapping`: Inputs for `forward` or `generate`, with `mm_encoder_outputs` in the place of `pixel_values`.
        """
        if not self.max_bytes or not can_share(model, inputs):
            return inputs
        pixels = inputs["pixel_values"]
        keys = [_content(picture) for picture in pixels]
        known = {key: self._features[key] for key in keys if key in self._features}
        # Each unknown picture once, however many prompts of the batch show it.
        unknown = {key: index for index, key in enumerate(keys) if key not in known}
        if unknown:
            computed = model.get_image_features(pixel_values=pixels[list(unknown.values())], return_dict=True)
            # Copies: a part of the batch's tensor would keep all of it in memory.
            known.update(zip(unknown, (block.clone() for block in computed.pooler_output), strict=True))
        for key, block in known.items():
            self._keep(key, block)
        blocks = _HANDED_OVER[model.config.model_type]([known[key] for key in keys])
        rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
        return {**rest, "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=blocks)}}

    def _keep(self, key: bytes, block: torch.Tensor) -> None:
        """Keeps a block as the latest, and forgets the oldest ones while there are too many bytes."""
        if key not in self._features:
            self._features[key] = block
            self.bytes += block.nbytes
        self._features.move_to_end(key)
        while self.bytes > self.max_bytes:
            _, oldest = self._features.popitem(last=False)
            self.bytes -= oldest.nbytes


def can_share(model, inputs: Mapping[str, Any]) -> bool:
    """Tells whether the features of these inputs' pictures are known to depend on each picture's pixels only."""
    pixels = inputs.get("pixel_values")
    return (
        model.config.model_type in _HANDED_OVER
        and isinstance(pixels, torch.Tensor)
        and pixels.ndim == 4
        and set(inputs) <= _TEXT_INPUTS | {"pixel_values"}
    )


def _content(picture: torch.Tensor) -> bytes:
    """Returns a fingerprint of a picture's values; all pictures of a model have one shape and dtype."""
    data = picture.contiguous().view(torch.uint8).cpu().numpy()
    return hashlib.blake2b(data, digest_size=16).digest()
