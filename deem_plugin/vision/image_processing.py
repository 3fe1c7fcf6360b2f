"""DeemImageProcessor: one image becomes the encoder's input and, on request, the target that is restored."""

import torch
from transformers import BatchFeature, CLIPImageProcessor
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs

from .configuration import DeemVisionConfig
from .tower import DeemVisionTower


class DeemImagesKwargs(ImagesKwargs, total=False):
    """
    target_size (`int`, *optional*):
        Side in pixels of `target_pixel_values`, which are left out when it is `None`.
    """

    target_size: int | None


class DeemImageProcessor(CLIPImageProcessor):
    """
    CLIP's image processing (shorter side resized, centre cropped), and the same view at the size that is restored.

    With `target_size=512` the result also holds `target_pixel_values` `(batch, 3, 512, 512)` in [-1, 1]. Both views
    come from the original image with one geometry. The official code flips the two independently, which teaches the
    encoder to ignore left and right.
    """

    valid_kwargs = DeemImagesKwargs
    target_size = None

    def _preprocess(self, images, target_size=None, **kwargs) -> BatchFeature:
        batch = super()._preprocess(images, **kwargs)
        if target_size is not None:
            crop = kwargs["crop_size"]
            if not kwargs["do_center_crop"] or crop.height != crop.width:
                raise ValueError(
                    f"`target_size` needs a square centre crop, got do_center_crop={kwargs['do_center_crop']} and "
                    f"crop_size={crop}. Set `crop_size` to one integer and `do_center_crop=True`."
                )
            factor = target_size / crop.height
            view = {
                "size": _scaled(kwargs["size"], factor),
                "crop_size": SizeDict(height=target_size, width=target_size),
                "do_normalize": True,
                "image_mean": (0.5, 0.5, 0.5),  # [0, 1] to [-1, 1], what a VAE reads
                "image_std": (0.5, 0.5, 0.5),
            }
            batch["target_pixel_values"] = super()._preprocess(images, **(kwargs | view))["pixel_values"]
        return batch

    def process_regions(self, masks: list) -> torch.Tensor:
        """
        Brings region masks, one an image, `(height, width)` of the original image, nonzero inside, into the geometry
        of `pixel_values`: `(batch, 1, crop height, crop width)`, ones and zeros. A region that the crop cuts off comes
        out empty, which the tower refuses.
        """
        regions = []
        for mask in masks:
            inside = (torch.as_tensor(mask) != 0).float()[None]
            if self.do_resize:
                # Antialiased, so that every part of the region leaves a trace whatever the scale.
                inside = self.resize(inside, self.size, resample=PILImageResampling.BILINEAR)
            if self.do_center_crop:
                inside = self.center_crop(inside, self.crop_size)
            regions.append((inside > 0).float())
        return torch.stack(regions)


def _scaled(size: SizeDict, factor: float) -> SizeDict:
    return SizeDict(**{name: round(value * factor) for name, value in dict(size).items() if value is not None})


def build_image_processor(
    config: DeemVisionConfig | DeemVisionTower, target_size: int | None = None
) -> DeemImageProcessor:
    """Builds the image processor of a tower or its config; `target_size` in pixels for `target_pixel_values`."""
    config = getattr(config, "config", config)
    return DeemImageProcessor(
        size={"shortest_edge": config.image_size},
        crop_size={"height": config.image_size, "width": config.image_size},
        image_mean=list(config.image_mean),
        image_std=list(config.image_std),
        target_size=target_size,
    )
