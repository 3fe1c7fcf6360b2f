"""The image processor of a model, and the normalisation of its pictures."""

import torch


def find_image_processor(model, processor):
    """
    Returns the image processor of a model: that of its processor, or the one where the model came from, which
    frameworks that hand on the tokenizer alone leave to be found; None if there is none.
    """
    image_processor = getattr(processor, "image_processor", processor)
    if hasattr(image_processor, "image_mean") or hasattr(image_processor, "do_rescale"):
        return image_processor
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "")
    if not name:
        return None
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(name, revision=getattr(config, "_commit_hash", None))
    except (OSError, ValueError, KeyError):
        return None


def normalization(image_processor, processor, mean=None, std=None):
    """
    Returns mean and std that pictures are normalised with: those that are given, or else the image processor's (which
    may be None). `processor` is what the caller was given, for the error.

    Raises:
        ValueError: If nobody knows.
    """
    if mean is not None:
        return list(mean), list(std)
    if image_processor is not None and getattr(image_processor, "do_normalize", True) is False:
        return [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
    mean, std = getattr(image_processor, "image_mean", None), getattr(image_processor, "image_std", None)
    if mean is None and hasattr(image_processor, "do_normalize"):
        raise ValueError(
            f"{type(image_processor).__name__} normalises each picture by statistics of its own, which the feedback "
            f"cannot undo to get the picture that the diffusion model must restore. It does not support such models."
        )
    if mean is None or std is None:
        raise ValueError(
            f"The pictures that the diffusion model must restore are made of `pixel_values`, whose normalisation is "
            f"not known: processing_class={type(processor).__name__} has no image_mean and image_std, and no image "
            f"processor was found where the model came from. Give the Trainer the model's processor "
            f"(`processing_class=processor`), or set `image_mean` and `image_std` of the FeedbackConfig."
        )
    return mean, std


def normalize(pictures, mean, std):
    """Pictures `(..., 3, height, width)` in [0, 1] to what a tower is shown, float32; `mean` and `std` by channel."""
    return (pictures.float() - _by_channel(mean, pictures)) / _by_channel(std, pictures)


def unnormalize(pictures, mean, std):
    """Undoes [`normalize`]. Not clamped: values outside [0, 1] tell that the statistics are wrong."""
    return pictures.float() * _by_channel(std, pictures) + _by_channel(mean, pictures)


def _by_channel(values, like):
    return torch.as_tensor(values, device=like.device, dtype=torch.float32).view(-1, 1, 1)


def process_image(image_processor, image) -> dict:
    """Returns what an image processor makes of one image."""
    try:
        inputs = image_processor(images=[image], return_tensors="pt")
    except (ValueError, TypeError):  # one list of images for each text
        inputs = image_processor(images=[[image]], return_tensors="pt")
    return {"pixel_values": inputs} if isinstance(inputs, torch.Tensor) else dict(inputs)
