import pytest
import torch
from diffusers import DDPMScheduler

from deem_plugin.feedback import DiffusionFeedback, PixArtDenoiser, UNetDenoiser, load_diffusion_model
from deem_plugin.feedback.latents import PixelCodec, VaeCodec

from ..tiny import LATENT_SIZE, tiny_sd_folder, tiny_unet, tiny_vae
from .helpers import losses_of_training
from .tiny_diffusion_models import CONTEXT_DIM, pixart


def make(name, prediction_type="epsilon"):
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    torch.manual_seed(0)
    if name == "unet":
        return UNetDenoiser(tiny_unet(CONTEXT_DIM), scheduler)
    return PixArtDenoiser(pixart(False, LATENT_SIZE), scheduler)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["unet", "pixart"])
def test_feedback_reaches_every_context_token_and_not_the_denoiser(name, prediction_type):
    denoiser = make(name, prediction_type)
    before = {n: v.clone() for n, v in denoiser.model.state_dict().items()}
    latents = torch.randn(2, 4, LATENT_SIZE, LATENT_SIZE)
    context = torch.randn(2, 5, CONTEXT_DIM, requires_grad=True)

    loss = DiffusionFeedback(denoiser)(latents, context, generator=torch.Generator().manual_seed(0))
    loss.mean().backward()

    assert loss.shape == (2,) and loss.dtype == torch.float32
    assert (context.grad.abs().sum(-1) > 0).all()
    assert all(p.grad is None for p in denoiser.model.parameters()) and not denoiser.model.training
    assert all(torch.equal(v, before[n]) for n, v in denoiser.model.state_dict().items())


@pytest.mark.parametrize("name", ["unet", "pixart"])
def test_the_loss_of_a_sample_does_not_depend_on_its_batch(name):
    denoiser = make(name)
    feedback = DiffusionFeedback(denoiser)
    latents, noise = torch.randn(2, 3, 4, LATENT_SIZE, LATENT_SIZE).unbind()
    context, timesteps = torch.randn(3, 5, CONTEXT_DIM), torch.tensor([5, 500, 990])

    whole = feedback(latents, context, timesteps=timesteps, noise=noise)

    for i in range(3):
        one = feedback(latents[i : i + 1], context[i : i + 1], timesteps=timesteps[i : i + 1], noise=noise[i : i + 1])
        torch.testing.assert_close(one[0], whole[i])


@pytest.mark.parametrize("name", ["unet", "pixart"])
def test_training_the_context_alone_lowers_the_loss(name):
    """The plumbing is right, not only the shapes: 40 steps on the context, always the same noise."""
    feedback = DiffusionFeedback(make(name))
    latents, noise = torch.randn(2, 2, 4, LATENT_SIZE, LATENT_SIZE).unbind()
    timesteps, context = torch.tensor([300, 600]), torch.zeros(2, 5, CONTEXT_DIM, requires_grad=True)

    losses = losses_of_training(
        lambda: feedback(latents, context, timesteps=timesteps, noise=noise).mean(),
        [context],
        steps=40,
        learning_rate=0.3,
    )

    assert losses[-1] < losses[0] * 0.995
    assert losses[-1] < min(losses[:20])


def test_a_stable_diffusion_folder_is_loaded_whole(tmp_path):
    diffusion_model = load_diffusion_model(tiny_sd_folder(tmp_path, CONTEXT_DIM, "v_prediction"))

    assert isinstance(diffusion_model.denoiser, UNetDenoiser) and isinstance(diffusion_model.codec, VaeCodec)
    assert diffusion_model.denoiser.context_dim == CONTEXT_DIM
    assert diffusion_model.image_size == 32
    assert diffusion_model.denoiser.scheduler.config.prediction_type == "v_prediction"
    latents = diffusion_model.encode(torch.rand(2, 3, 50, 40), generator=torch.Generator().manual_seed(0))
    assert latents.shape == (2, 4, LATENT_SIZE, LATENT_SIZE)
    assert diffusion_model.codec.decode(latents).shape == (2, 3, 32, 32)


def test_a_folder_without_a_vae_is_a_pixel_space_diffusion_model(tmp_path):
    save_pixart(tmp_path)

    diffusion_model = load_diffusion_model(tmp_path, dtype="bfloat16")

    assert isinstance(diffusion_model.denoiser, PixArtDenoiser) and isinstance(diffusion_model.codec, PixelCodec)
    assert diffusion_model.denoiser.model.dtype == torch.bfloat16
    assert diffusion_model.image_size == LATENT_SIZE


def save_pixart(path):
    import json

    pixart(False, LATENT_SIZE, channels=3).save_pretrained(path / "transformer")
    DDPMScheduler().save_pretrained(path / "scheduler")
    index = {
        "_class_name": "PixArtAlphaPipeline",
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    (path / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer": ["diffusers", "DiTTransformer2DModel"]}, "network is DiTTransformer2DModel.*UNet2D.*Flux"),
        ({"scheduler": ["diffusers", "EDMEulerScheduler"]}, "EDM's preconditioning"),
        ({"vae": ["diffusers", "VQModel"]}, "VQModel; expected one of AutoencoderKL, AutoencoderDC, AutoencoderTiny"),
    ],
    ids=["network", "scheduler", "vae"],
)
def test_an_unknown_diffusion_model_is_refused_with_what_is_known(tmp_path, change, message):
    import json

    save_pixart(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, **change}))

    with pytest.raises(ValueError, match=message):
        load_diffusion_model(tmp_path)


def test_a_folder_that_is_no_diffusion_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no readable `model_index.json`.*mirror"):
        load_diffusion_model(str(tmp_path))


@pytest.mark.parametrize("text", ["[1]", "{", ""])
def test_an_index_that_is_none_is_an_error_that_says_so(tmp_path, text):
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(ValueError, match="no readable `model_index.json`"):
        load_diffusion_model(str(tmp_path))


def test_a_unet_with_extra_conditions_is_refused():
    unet = tiny_unet(CONTEXT_DIM)
    unet.register_to_config(addition_embed_type="image")

    with pytest.raises(ValueError, match="addition_embed_type='image'.*XL"):
        UNetDenoiser(unet, DDPMScheduler())


def test_the_vae_draws_from_its_posterior_and_leaves_the_picture_alone():
    codec = VaeCodec(tiny_vae())
    picture = torch.rand(2, 3, 32, 32) * 2 - 1
    kept, noise = picture.clone(), torch.randn(2, 4, LATENT_SIZE, LATENT_SIZE)

    latents = codec.encode(picture, noise=noise)

    posterior = codec.vae.encode(picture).latent_dist
    expected = (posterior.mean + posterior.std * noise) * codec.vae.config.scaling_factor
    torch.testing.assert_close(latents, expected)
    assert torch.equal(picture, kept)
