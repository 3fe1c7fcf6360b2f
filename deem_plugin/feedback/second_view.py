"""An augmented view of a picture, for objectives that compare two."""

from dataclasses import replace

import torch


def augmented_views(views, eyes, objective, generator):
    """
    Shows an augmented version of each view's picture to the tower.

    Args:
        views (`list[View]`): Of a call.
        eyes (`Eyes`): Show pictures to the tower.
        objective: With `official_defects` pictures are augmented as in DCR's published code.
        generator (`torch.Generator`): Seeds the augmentation.

    Returns:
        `list[View]`: One for each, in the same order.
    """
    pictures = [view.picture for view in views]
    if objective.official_defects:
        normalized = [augment_as_published(eyes.normalize(picture)[None], generator)[0] for picture in pictures]
        pictures = [eyes.unnormalize(picture) for picture in normalized]
    else:
        pictures = [augment(picture.clamp(0, 1)[None], generator)[0] for picture in pictures]
    again = eyes.look(pictures)
    return [replace(new, image=view.image, weight=view.weight) for new, view in zip(again, views, strict=True)]


def augment(pictures, generator):
    """
    Augments pictures mildly, each in its own way: colours by a tenth, and a crop of 90 to 100 % of the area (DCR).

    There are no flips: they would teach the tower that left and right, or a text and its mirror image, are the same.

    Args:
        pictures (`torch.Tensor`): Shape `(images, 3, height, width)` in [0, 1].
        generator (`torch.Generator`): Seeds the augmentation; torch's global generators are left as they were.

    Returns:
        `torch.Tensor`: As the input.
    """
    return _apply(pictures, generator, flips=False)


def augment_as_published(pixel_values, generator):
    """
    Augments as DCR's code does: the same on `pixel_values`, normalised already, which clamps them to [0, 1] and so
    wipes out all that is darker than the mean; and with flips in both directions.

    Args:
        pixel_values (`torch.Tensor`): Shape `(images, 3, height, width)`, normalised.
        generator (`torch.Generator`): As in [`augment`].
    """
    return _apply(pixel_values, generator, flips=True)


def _apply(pictures, generator, flips):
    from torchvision.transforms import v2

    size = tuple(pictures.shape[-2:])
    steps = [
        v2.ColorJitter(brightness=0.1, contrast=0.1, saturation=0.1, hue=0.05),
        v2.RandomResizedCrop(size, scale=(0.9, 1.0), ratio=(0.9, 1.1), antialias=True),
    ]
    if flips:
        steps[1:1] = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]
    transform = v2.Compose(steps)
    seed = torch.randint(2**31, (), generator=generator, device=generator.device).item()
    with torch.random.fork_rng(devices=[]):
        # The CPU's generator alone: `torch.manual_seed` would seed every GPU, too.
        torch.random.default_generator.manual_seed(seed)
        return torch.stack([transform(picture) for picture in pictures])
