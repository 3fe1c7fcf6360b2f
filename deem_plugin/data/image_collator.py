"""Makes batches of images alone, for the training of an encoder without text."""

from typing import Any

import torch
from torchvision.transforms import v2

from deem_plugin.data.images import load_image
from deem_plugin.seeding import cpu_seed


class ImageCollator:
    """
    Makes a batch of images alone, for the training of an encoder without text.

    A random crop is drawn by the example's `seed`, so that a resumed run draws it again, and before the processor, so
    that both views show the same.

    Args:
        image_processor (`BaseImageProcessor`): Image processor of the encoder.
        crop_area (`float`, *optional*):
            Crops each picture at random to a square that keeps so much of its area at least, 0.9 in DIVA, GenHancer
            and DCR. By default the processor's own geometry.
        target_size (`int`, *optional*): Also gives the crop itself with so many pixels a side, for the diffusion
            model.
    """

    def __init__(self, image_processor, crop_area: float | None = None, target_size: int | None = None):
        self.image_processor = image_processor
        self.target_size = target_size
        self.crop = None
        if crop_area is not None:
            size = target_size
            if size is None:
                blank = torch.zeros(3, 64, 64, dtype=torch.uint8)
                size = image_processor(blank, return_tensors="pt")["pixel_values"].shape[-1]
            bicubic = v2.InterpolationMode.BICUBIC
            crop = v2.RandomResizedCrop(size, scale=(crop_area, 1.0), interpolation=bicubic, antialias=True)
            self.crop = v2.Compose([v2.PILToTensor(), crop])

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Collates examples with `image` (a picture, or what `load_image` takes) and, for crops, `seed` to `pixel_values`
        `(batch, 3, height, width)` and, with a `target_size`, `target_pixel_values` `(batch, 3, target_size,
        target_size)` in [-1, 1].
        """
        images = [load_image(example["image"]) for example in examples]
        if self.crop is None:
            return dict(self.image_processor(images, return_tensors="pt"))
        crops = [self._crop(image, example["seed"]) for image, example in zip(images, examples, strict=True)]
        batch = dict(self.image_processor(crops, return_tensors="pt"))
        if self.target_size is not None:
            batch["target_pixel_values"] = torch.stack(crops).float() / 127.5 - 1
        return batch

    def _crop(self, image, seed: int) -> torch.Tensor:
        # torchvision draws from the global generator of the CPU.
        with cpu_seed(seed):
            return self.crop(image)
