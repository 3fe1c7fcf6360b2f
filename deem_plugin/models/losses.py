"""The losses of the interleaved model: means over what counts, on all ranks alike."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .interleaving import IGNORE_INDEX


@dataclass
class Draws:
    """
    The random numbers of one denoising loss, for those who bring their own. What is `None` is drawn.

    Args:
        latent_noise (`torch.Tensor`, *optional*): The draw from the autoencoder's posterior, shape of the latents.
        noise (`torch.Tensor`, *optional*): Standard normal, shape of the latents.
        timesteps (`torch.Tensor`, *optional*): Integers, shape `(images,)`.
        dropped (`torch.Tensor`, *optional*): True where the context gives way to the null context, shape `(images,)`.
    """

    latent_noise: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    timesteps: torch.Tensor | None = None
    dropped: torch.Tensor | None = None


def next_token_loss(logits, labels, num_items=None):
    """
    Cross-entropy of the next token (NTP, Eq. 2), 0 where nothing is to be learned.

    Args:
        logits (`torch.Tensor`): Shape `(batch, tokens, vocabulary)`.
        labels (`torch.Tensor`): Token ids, -100 where nothing is learned, `(batch, tokens)`, not shifted.
        num_items (`int` or `torch.Tensor`, *optional*):
            Learned tokens of the whole optimizer step, as the Trainer counts them; those of this batch by default.
    """
    targets = labels[:, 1:].reshape(-1)
    total = F.cross_entropy(
        logits[:, :-1].float().reshape(-1, logits.shape[-1]), targets, ignore_index=IGNORE_INDEX, reduction="sum"
    )
    if num_items is None:
        num_items = (targets != IGNORE_INDEX).sum().clamp(min=1)
    return total / num_items


def mean_over_valid(losses, valid=None):
    """
    Averages per-image losses over the valid images of all ranks.

    The ranks' gradients are averaged afterwards, so each rank's share is scaled by their number: what is summed is
    then the mean over all valid images, however many a rank has.

    Args:
        losses (`torch.Tensor`): Shape `(images,)`.
        valid (`torch.Tensor`, *optional*): True where an image counts, shape `(images,)`.

    Returns:
        `torch.Tensor`: A scalar, 0 where no rank has a valid image.
    """
    valid = torch.ones_like(losses) if valid is None else valid.to(losses.dtype)
    count, ranks = valid.sum(), 1
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count)
        ranks = dist.get_world_size()
    return (losses * valid).sum() * ranks / count.clamp(min=1)
