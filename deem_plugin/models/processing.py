"""DeemProcessor: texts with marks for pictures, the pictures, and regions of them, as a DEEM reads them."""

import torch
from transformers import ProcessorMixin

from ..vision.regions import region_mask, square_around

IMAGE_TOKEN = "<image>"
IMAGE_START_TOKEN = "<image_start>"


class DeemProcessor(ProcessorMixin):
    """
    Puts an image start and the slots of the tower's tokens in the place of each `<image>`.

    Args:
        image_processor (`DeemImageProcessor`): Of the tower.
        tokenizer (`PreTrainedTokenizerBase`): That knows `<image>` and `<image_start>`.
        num_image_tokens (`int`): Slots of a picture: the tower's `num_image_tokens`.
        chat_template (`str`, *optional*): Jinja template of conversations.
    """

    def __init__(self, image_processor=None, tokenizer=None, num_image_tokens=77, chat_template=None, **kwargs):
        self.num_image_tokens = num_image_tokens
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.image_start_token = IMAGE_START_TOKEN
        self.image_start_token_id = tokenizer.convert_tokens_to_ids(IMAGE_START_TOKEN)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images=None, text=None, regions=None, **kwargs):
        """
        Args:
            images (`list`, *optional*): Pictures in the order of their marks, in one list or in one for each text.
            text (`str` or `list[str]`): Texts with marks.
            regions (`list`, *optional*):
                Arranged like `images`: `None` where the whole picture is meant, else a mask, box or points in the
                pixels of the picture, see `region_mask`. Pictures and masks go through one geometry, see
                `show_regions`.
            kwargs: As for every processor of transformers.

        Returns:
            `BatchFeature`: What the tokenizer and the image processor return, and where there are regions
            `region_masks` `(images, 1, height, width)`, ones for whole pictures.

        Raises:
            ValueError: If marks, pictures and regions do not match, or a region does not meet the visible picture.
        """
        if regions is not None:
            if images and isinstance(images[0], (list, tuple)):
                images, regions = ([item for own in lists for item in own] for lists in (images, regions))
            if len(regions) != len(images or []):
                raise ValueError(
                    f"Got {len(regions)} entries of `regions` for {len(images or [])} pictures; expected one each."
                )
            images, regions = self.show_regions(images, regions)
        inputs = super().__call__(images=images, text=text, **kwargs)
        if regions is not None and any(region is not None for region in regions):
            inputs["region_masks"] = self.region_masks(images, regions)
        return inputs

    def replace_image_token(self, image_inputs, image_idx, **kwargs) -> str:
        """Returns what stands for a picture in the text: the start and its slots."""
        return IMAGE_START_TOKEN + IMAGE_TOKEN * self.num_image_tokens

    def show_regions(self, images, regions) -> tuple[list, list]:
        """
        Cuts pictures so that the crop to the middle, which comes next, leaves their regions in.

        Only a picture whose region would lose something is cut: to the square next to the middle that shows it.

        Args:
            images (`list[Image.Image]`): The pictures.
            regions (`list`): For each picture its region, see `region_mask`, or `None` for all of it.

        Returns:
            `tuple[list[Image.Image], list]`: Pictures, and for each the boolean mask of its region or `None`.
        """
        shown, masks = list(images), [None] * len(images)
        for index, (image, region) in enumerate(zip(images, regions, strict=True)):
            if region is None:
                continue
            mask = masks[index] = region_mask(region, *image.size)
            left, top, right, bottom = square = square_around(mask)
            middle = ((image.width - (right - left)) // 2, (image.height - (bottom - top)) // 2)
            if self.image_processor.do_center_crop and (left, top) != middle:
                shown[index], masks[index] = image.crop(square), mask[top:bottom, left:right]
        return shown, masks

    def region_masks(self, images, masks) -> torch.Tensor:
        """
        Brings the masks of regions into the geometry of `pixel_values`.

        Args:
            images (`list[Image.Image]`): The pictures.
            masks (`list`): For each picture the mask of its region, or `None` for all of it.

        Returns:
            `torch.Tensor`: Ones and zeros, shape `(images, 1, height, width)`.

        Raises:
            ValueError: If a region does not meet the visible part of its picture.
        """
        seen = []
        for image, mask in zip(images, masks, strict=True):
            inside = torch.ones(image.height, image.width) if mask is None else mask
            seen.append(self.image_processor.process_regions([inside])[0])
        cut = [index for index, mask in enumerate(seen) if not mask.any()]
        if cut:
            raise ValueError(
                f"The regions of pictures {cut} lie outside of what is left of them after resizing and cropping. "
                f"Leave these samples out, or crop the pictures around the regions beforehand."
            )
        return torch.stack(seen)
