"""The controls differ from the feedback in what they are named after and in nothing else."""

import torch

from deem_plugin.demo.controls import AnotherImage, PixelDecoder
from deem_plugin.demo.diffusion_model import CONTEXT_DIM, CONTEXT_TOKENS, IMAGE_SIZE, shipped_diffusion_model
from deem_plugin.feedback.diffusion_feedback import DiffusionFeedback
from deem_plugin.feedback.diffusion_model import load_diffusion_model
from deem_plugin.feedback.timesteps import TIMESTEP_SAMPLERS


def test_another_image_is_the_feedback_of_the_neighbour():
    denoiser = load_diffusion_model(str(shipped_diffusion_model())).denoiser
    pictures = torch.rand(3, 3, IMAGE_SIZE, IMAGE_SIZE) * 2 - 1
    context = torch.randn(3, CONTEXT_TOKENS, CONTEXT_DIM, requires_grad=True)
    sampler = TIMESTEP_SAMPLERS["shrink"]
    control = AnotherImage(denoiser, sampler)
    loss = control(pictures, context, generator=torch.Generator().manual_seed(0))
    expected = DiffusionFeedback(denoiser, sampler)(
        pictures[[2, 0, 1]], context, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(loss, expected)
    assert control.context_dim == CONTEXT_DIM
    loss.mean().backward()
    assert context.grad.abs().sum() > 0


def test_pixel_decoder_is_zero_for_a_context_that_is_the_picture():
    pictures = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE) * 2 - 1
    decoder = PixelDecoder()
    context = pictures.reshape(2, CONTEXT_TOKENS, decoder.context_dim)
    assert torch.equal(decoder(pictures, context), torch.zeros(2))
    torch.testing.assert_close(decoder(pictures, context + 0.5), torch.full((2,), 0.25))
