"""The demo's controls: what the feedback is compared with, so that no more is claimed for it than is its own."""

from deem_plugin.feedback.diffusion_feedback import DiffusionFeedback

from .diffusion_model import CONTEXT_TOKENS, IMAGE_SIZE


class AnotherImage:
    """
    Feedback toward the next picture of the batch: the gradient of a denoising error that holds no information.

    What is left of the gain under it is due to the disturbance, not to what the diffusion model knows.
    """

    def __init__(self, denoiser, sample_timesteps):
        self.feedback = DiffusionFeedback(denoiser, sample_timesteps)

    @property
    def context_dim(self) -> int:
        """Width of the context, the diffusion model's."""
        return self.feedback.context_dim

    def __call__(self, latents, context, *, generator=None):
        """Returns the denoising error `(batch,)` of each picture's neighbour given the picture's own context."""
        return self.feedback(latents.roll(1, dims=0), context, generator=generator)


class PixelDecoder:
    """
    Reconstruction without diffusion: each token gives its share of the picture, by the conditioner's linear layer.

    What is left of the gain under it is due to restoring the picture, not to the diffusion model.
    """

    context_dim = 3 * IMAGE_SIZE**2 // CONTEXT_TOKENS

    def __init__(self, denoiser=None, sample_timesteps=None):
        pass

    def __call__(self, latents, context, *, generator=None):
        """Returns the squared error `(batch,)` of the picture that the context `(batch, 8, 96)` gives."""
        return (context.flatten(1) - latents.flatten(1)).square().mean(dim=1)


CONTROLS = {"another-image": AnotherImage, "pixel-decoder": PixelDecoder}
