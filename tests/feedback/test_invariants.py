"""What must hold of any feedback method; each test catches a defect that some published code has."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from transformers import SiglipImageProcessor

from deem_plugin.feedback import (
    DiffusionFeedback,
    DiffusionFeedbackCallback,
    PixelCodec,
    load_diffusion_model,
)
from deem_plugin.feedback.conditions import condition_of
from deem_plugin.feedback.contrastive import ContrastiveFeedback
from deem_plugin.feedback.loss import FeedbackLoss
from deem_plugin.feedback.processes import forward_process
from deem_plugin.vision.eyes import Eyes

from ..tiny import tiny_image, tiny_image_processor, tiny_llava, tiny_sd_folder
from .helpers import CONTEXT_DIM, feedback_config, pixel_diffusion_model, views_of

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SIGLIP = SiglipImageProcessor(size={"height": 32, "width": 32})


class TrueAnswers:
    """A denoiser that knows the very noise and picture, and answers as its kind of model should."""

    context_dim, vector_dim = CONTEXT_DIM, 0

    def __init__(self, kind, latents, noise):
        self.kind, self.latents, self.true_noise = kind, latents, noise
        flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.process = forward_process(flow if kind == "flow" else DDPMScheduler(prediction_type=kind))

    def __call__(self, noisy, timesteps, context, vector=None):
        if self.kind == "epsilon":
            return self.true_noise
        if self.kind == "flow":
            return self.true_noise - self.latents
        alpha = self.process.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return alpha.sqrt() * self.true_noise - (1 - alpha).sqrt() * self.latents


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_whoever_knows_noise_and_picture_makes_no_error(kind):
    """DCR's code asks a model that predicts the noise for the velocity."""
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    feedback = DiffusionFeedback(TrueAnswers(kind, latents, noise))

    loss = feedback(latents, torch.zeros(3, 1, CONTEXT_DIM), noise=noise, timesteps=torch.tensor([0, 400, 999]))

    assert loss.max() < 1e-10


class SeenByCodec(PixelCodec):
    """Keeps what it is given."""

    def posterior(self, pictures):
        self.pictures = pictures
        return super().posterior(pictures)


def what_the_vae_sees(image, processor, **settings):
    """The lowest and the highest value that an image processor's picture has for the autoencoder."""
    config = feedback_config(**settings)
    diffusion_model = pixel_diffusion_model()
    diffusion_model.codec = codec = SeenByCodec()
    eyes = Eyes.of(tiny_llava()[0], processor, config.image_mean, config.image_std)
    pixel_values = processor([image], return_tensors="pt")["pixel_values"]
    views = views_of(torch.zeros(1, 4, 8), eyes.unnormalize(pixel_values))
    FeedbackLoss(diffusion_model, None, config.condition, eyes).encode(views, torch.Generator())
    return codec.pictures.min().item(), codec.pictures.max().item()


@pytest.mark.parametrize("processor", [tiny_image_processor(), SIGLIP], ids=["CLIP", "SigLIP"])
@pytest.mark.parametrize(("color", "value"), [("white", 1.0), ("black", -1.0)])
def test_white_is_one_and_black_minus_one_for_the_vae(processor, color, value):
    assert what_the_vae_sees(Image.new("RGB", (40, 32), color), processor) == pytest.approx((value, value), abs=1e-6)


def test_several_draws_have_the_gradient_of_their_mean():
    """So that draws change neither the scale of the loss nor, on average, its gradient (DIVA: five to one)."""
    denoiser = pixel_diffusion_model().denoiser
    rng = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, 32, 32, generator=rng), torch.randn(6, 3, 32, 32, generator=rng)
    timesteps = torch.tensor([1, 300, 700, 20, 500, 999])
    context = torch.randn(2, 4, CONTEXT_DIM, generator=rng).requires_grad_()

    def gradient(draws, chosen):
        feedback = DiffusionFeedback(denoiser, draws=draws)
        loss = feedback(latents, context, noise=noise[chosen], timesteps=timesteps[chosen]).mean()
        return torch.autograd.grad(loss, context)[0]

    each = [gradient(1, slice(draw, None, 3)) for draw in range(3)]
    torch.testing.assert_close(gradient(3, slice(None)), torch.stack(each).mean(0))


def test_evaluation_draws_no_patches():
    """DIVA's code evaluates with random patches, and its README advises to try several seeds."""
    config = feedback_config(condition={"kind": "cls+patches", "num_patches": 3})
    callback = DiffusionFeedbackCallback(config, pixel_diffusion_model())
    callback.attach(*tiny_llava())
    views = views_of(torch.randn(2, 16, 32), pooled=torch.randn(2, 32))

    def context(seed):
        return condition_of(views, config.condition, callback.conditioner, torch.Generator().manual_seed(seed))[0]

    assert context(0).shape[1] == 4
    with torch.no_grad():
        assert context(0).shape[1] == 17 and torch.equal(context(0), context(1))


def test_the_augmented_view_spans_what_a_normalised_picture_spans():
    """DCR's code jitters colours after normalisation, which wipes out all that is darker than the mean."""
    lowest, highest, (least, most) = augmented_span(ContrastiveFeedback(None))

    assert least == pytest.approx(lowest, abs=0.3) and most == pytest.approx(highest, abs=0.3)


def augmented_span(objective):
    """The least and the highest value of what a tower is shown of some pictures, and those of their second views."""
    processor = tiny_image_processor()
    pixel_values = processor([tiny_image(seed) for seed in range(4)], return_tensors="pt")["pixel_values"]
    eyes = Eyes.of(tiny_llava()[0], processor)
    views = eyes.look(list(eyes.unnormalize(pixel_values)))
    shown = objective.second_views(views, eyes, torch.Generator().manual_seed(0))
    augmented = eyes.normalize(torch.stack([view.picture for view in shown]))
    return pixel_values.min().item(), pixel_values.max().item(), (augmented.min().item(), augmented.max().item())


def test_a_picture_is_restored_at_the_size_that_is_asked_for(tmp_path):
    """DCR restores 224 pixels with a diffusion model of 512."""
    folder = str(tiny_sd_folder(tmp_path / "sd"))
    callback = DiffusionFeedbackCallback(feedback_config(diffusion_model={"path": folder, "image_size": 8}))

    callback.attach(*tiny_llava())

    assert callback.diffusion_model.encode(torch.rand(1, 3, 32, 32)).shape[-2:] == (4, 4)
    assert load_diffusion_model(folder).encode(torch.rand(1, 3, 40, 40)).shape[-2:] == (16, 16)
    with pytest.raises(ValueError, match="`image_size` is 9, but a latent cell .* has 2 pixels a side"):
        load_diffusion_model(folder, image_size=9)
