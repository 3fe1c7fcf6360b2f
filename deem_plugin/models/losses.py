"""The losses of the interleaved model: means over what counts, whatever the batch was cut into."""

from dataclasses import dataclass

import torch
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


def next_token_loss(logits, labels, total=None):
    """
    Cross-entropy of the next token (NTP, Eq. 2), 0 where nothing is to be learned.

    Args:
        logits (`torch.Tensor`): Shape `(batch, tokens, vocabulary)`.
        labels (`torch.Tensor`): Token ids, -100 where nothing is learned, `(batch, tokens)`, not shifted.
        total (`int` or `torch.Tensor`, *optional*): Learned tokens to divide by; those of this batch by default.
    """
    targets = labels[:, 1:].reshape(-1)
    losses = F.cross_entropy(
        logits[:, :-1].float().reshape(-1, logits.shape[-1]), targets, ignore_index=IGNORE_INDEX, reduction="none"
    )
    return mean_of_valid(losses, targets != IGNORE_INDEX, total)


def mean_of_valid(losses, valid=None, total=None):
    """
    Averages losses over the items that count.

    Args:
        losses (`torch.Tensor`): Shape `(items,)`.
        valid (`torch.Tensor`, *optional*): True where an item counts, shape `(items,)`.
        total (`int` or `torch.Tensor`, *optional*):
            What to divide by: the items that count in the whole optimizer step, over its micro-batches and ranks, so
            that the sum over these is the mean over all. By default those of this call.

    Returns:
        `torch.Tensor`: A scalar, 0 where nothing counts.
    """
    valid = torch.ones_like(losses) if valid is None else valid.to(losses.dtype)
    total = valid.sum() if total is None else torch.as_tensor(total, device=losses.device)
    return (losses * valid).sum() / total.clamp(min=1)
