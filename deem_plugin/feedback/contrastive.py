"""Contrastive feedback: the picture's own condition must explain it better than other pictures' conditions do."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from ..seeding import cpu_seed
from .diffusion_feedback import Objective
from .timesteps import uniform

# Divides the cosines, as published.
TEMPERATURE = 0.1


class ContrastiveFeedback(Objective):
    """
    The contrastive diffusion loss of DCR (https://arxiv.org/abs/2603.04803, Sec. 3).

    One noisy picture is shown to the denoiser with its own condition (the anchor), with that of an augmented view of
    it (a positive) and with those of other pictures (negatives). The anchor's prediction should resemble the positive
    and the true target, not the negatives: conditions that say the same of every picture, which a plain denoising
    error forgives, are punished.

    Args:
        denoiser, sample_timesteps: As in [`Objective`].
        num_negatives (`int`, *optional*): Other pictures of the micro-batch for each one, so that the denoiser runs on
            `num_negatives + 2` times the batch; all of them by default, as in the published code.
    """

    def __init__(self, denoiser, sample_timesteps=uniform, num_negatives=None):
        super().__init__(denoiser, sample_timesteps)
        self.num_negatives = num_negatives

    def __call__(
        self, latents, context, *, second_view, vector=None, mask=None, timesteps=None, noise=None, generator=None
    ):
        """
        Args:
            latents, context, vector, mask, timesteps, noise, generator: As in [`DiffusionFeedback`], one draw each.
            second_view (`tuple`): Context and vector of an augmented view of each picture.

        Returns:
            `torch.Tensor`: The loss of each picture, shape `(batch,)`, float32.

        Raises:
            ValueError: If the micro-batch holds no other picture.
        """
        batch = len(latents)
        if batch < 2:
            raise ValueError(
                "`objective: contrastive` compares the pictures of a micro-batch, and this one holds a single one. "
                "Set `training.per_device_train_batch_size` to 2 or more and `training.dataloader_drop_last: true`."
            )
        noise, timesteps = self.draw(latents, context, noise, timesteps, generator)
        noisy_latents = self.denoiser.process.noise(latents, noise, timesteps)
        own, others = torch.arange(batch), self._others(batch)
        rows = torch.cat([own, own, own.repeat_interleave(others.shape[1])]).to(latents.device)
        conditions = torch.cat([own, own + batch, others.flatten()]).to(latents.device)
        contexts = torch.cat([context, second_view[0]])[conditions]
        vectors = None if vector is None else torch.cat([vector, second_view[1]])[conditions]
        predictions = self.denoiser(noisy_latents[rows], timesteps[rows], contexts, vectors).float()
        target = self.target(latents, noise, timesteps).float()
        if mask is not None:  # what lies in a letterbox resembles nothing
            predictions, target = predictions * mask[rows], target * mask
        anchor, positive, negatives = predictions.flatten(1).split([batch, batch, others.numel()])
        negatives = negatives.unflatten(0, others.shape)
        candidates = torch.cat([positive[:, None], target.flatten(1)[:, None], negatives], dim=1)
        similarity = F.cosine_similarity(anchor[:, None], candidates, dim=-1) / TEMPERATURE
        return -similarity.log_softmax(dim=1)[:, :2].mean(dim=1)

    def _others(self, batch):
        """Returns for each picture the numbers of the next ones in the batch, `(batch, negatives)`."""
        count = batch - 1 if self.num_negatives is None else min(self.num_negatives, batch - 1)
        return (torch.arange(batch)[:, None] + 1 + torch.arange(count)) % batch

    def target(self, latents, noise, timesteps):
        """Returns what the anchor should resemble: what the denoiser should predict, shape of `latents`."""
        return self.denoiser.process.target(latents, noise, timesteps)

    def second_views(self, views, eyes, generator):
        """
        Shows an augmented version of each view's picture to the tower, in the same order: what `second_view` is made
        of. `generator` seeds the augmentation.
        """
        again = eyes.look([self.augment(view.picture, eyes, generator) for view in views])
        return [replace(new, image=view.image, weight=view.weight) for new, view in zip(again, views, strict=True)]

    def augment(self, picture, eyes, generator):
        """Augments a picture `(3, height, width)` in [0, 1] by [`augmentation`]."""
        return seeded(augmentation(picture.shape[-2:]), picture.clamp(0, 1), generator)


def augmentation(size):
    """
    Returns a mild augmentation of pictures of `size` (height, width): colours by a tenth, and a crop of 90 to 100 % of
    the area (DCR).

    There are no flips: they would teach the tower that left and right, or a text and its mirror image, are the same.
    """
    from torchvision.transforms import v2

    colours = v2.ColorJitter(brightness=0.1, contrast=0.1, saturation=0.1, hue=0.05)
    return v2.Compose([colours, v2.RandomResizedCrop(size, scale=(0.9, 1.0), ratio=(0.9, 1.1), antialias=True)])


def seeded(transform, picture, generator):
    """Returns a random transform of a picture, drawn from `generator`; torch's global ones stay as they were."""
    seed = torch.randint(2**31, (), generator=generator, device=generator.device).item()
    with cpu_seed(seed):
        return transform(picture)
