"""Contrastive feedback: the picture's own condition must explain it better than other pictures' conditions do."""

import torch
import torch.nn.functional as F

from .denoisers import check_context_dim
from .timesteps import uniform


class ContrastiveFeedback:
    """
    The contrastive diffusion loss of DCR (https://arxiv.org/abs/2603.04803, Sec. 3).

    One noisy picture is shown to the denoiser with its own condition (the anchor), with that of an augmented view of
    it (a positive) and with those of other pictures (negatives). The anchor's prediction should resemble the positive
    and the true target, not the negatives: conditions that say the same of every picture, which a plain denoising
    error forgives, are punished.

    With `official_defects` the target is the velocity whatever the diffusion model predicts, as in the published code.

    Args:
        denoiser (`Denoiser`): The frozen network.
        sample_timesteps (`Callable`, *optional*): As in [`DiffusionFeedback`].
        num_negatives (`int`, *optional*):
            Other pictures of the micro-batch for each one, so that the denoiser runs on `num_negatives + 2` times the
            batch; all of them by default, as in the published code.
        temperature (`float`, *optional*, defaults to `0.1`): Divides the cosines.
        official_defects (`bool`, *optional*, defaults to `False`): See above.
    """

    # The training loop then also makes the condition of an augmented view.
    second_view = True

    def __init__(
        self, denoiser, sample_timesteps=uniform, num_negatives=None, temperature=0.1, official_defects=False
    ):
        self.denoiser = denoiser
        self.sample_timesteps = sample_timesteps
        self.num_negatives = num_negatives
        self.temperature = temperature
        self.official_defects = official_defects

    @property
    def context_dim(self) -> int:
        """Width of the context tokens that it scores."""
        return self.denoiser.context_dim

    @property
    def vector_dim(self) -> int:
        """Width of the vector that modulates the denoiser; 0 if it takes none."""
        return self.denoiser.vector_dim

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
        check_context_dim(context.shape[-1], self.denoiser)
        batch = len(latents)
        if batch < 2:
            raise ValueError(
                "`objective: contrastive` compares the pictures of a micro-batch, and this one holds a single one. "
                "Set `training.per_device_train_batch_size` to 2 or more and `training.dataloader_drop_last: true`."
            )
        if noise is None:
            noise = torch.randn(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        if timesteps is None:
            timesteps = self.sample_timesteps(
                batch, self.denoiser.num_train_timesteps, generator=generator, device=latents.device
            )
        noisy_latents = self.denoiser.noise(latents, noise, timesteps)
        own, others = torch.arange(batch), self._others(batch)
        rows = torch.cat([own, own, own.repeat_interleave(others.shape[1])]).to(latents.device)
        conditions = torch.cat([own, own + batch, others.flatten()]).to(latents.device)
        contexts = torch.cat([context, second_view[0]])[conditions]
        vectors = None if vector is None else torch.cat([vector, second_view[1]])[conditions]
        predictions = self.denoiser(noisy_latents[rows], timesteps[rows], contexts, vectors).float()
        if mask is not None:  # what lies in a letterbox resembles nothing
            predictions = predictions * mask[rows]
        predictions = predictions.flatten(1)
        anchor, positive = predictions[:batch], predictions[batch : 2 * batch]
        negatives = predictions[2 * batch :].unflatten(0, others.shape)
        target = self._target(latents, noise, timesteps).float()
        target = (target if mask is None else target * mask).flatten(1)
        candidates = torch.cat([positive[:, None], target[:, None], negatives], dim=1)
        similarity = F.cosine_similarity(anchor[:, None], candidates, dim=-1) / self.temperature
        return -similarity.log_softmax(dim=1)[:, :2].mean(dim=1)

    def _others(self, batch):
        """Returns for each picture the numbers of the next ones in the batch, `(batch, negatives)`."""
        count = batch - 1 if self.num_negatives is None else min(self.num_negatives, batch - 1)
        return (torch.arange(batch)[:, None] + 1 + torch.arange(count)) % batch

    def _target(self, latents, noise, timesteps):
        if self.official_defects:
            return self.denoiser.scheduler.get_velocity(latents, noise, timesteps)
        return self.denoiser.target(latents, noise, timesteps)
