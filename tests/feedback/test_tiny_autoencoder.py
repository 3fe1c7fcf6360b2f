"""A tiny autoencoder in place of the VAE: its latents are those that the denoiser knows, or it is refused."""

import pytest
import torch
from diffusers import AutoencoderTiny

from deem_plugin.feedback import DiffusionFeedbackCallback, DiffusionModelConfig, load_diffusion_model
from deem_plugin.feedback.factory import load_configured
from deem_plugin.feedback.latent_cache import LatentCache, LatentWriter, fingerprint

from ..tiny import tiny_sd_folder, tiny_vae
from .helpers import feedback_config, train
from .runs import logged
from .tiny_diffusion_models import save_diffusion_model


def tiny_autoencoder(folder, channels=4, blocks=2, **settings):
    """Saves an `AutoencoderTiny` of random weights that makes a cell of 2 ^ (blocks - 1) pixels a side."""
    shape = {f"{half}_block_out_channels": (8,) * blocks for half in ("encoder", "decoder")}
    shape |= {f"num_{half}_blocks": (1,) * blocks for half in ("encoder", "decoder")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderTiny(latent_channels=channels, **shape, **settings).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    """A generator whose VAE shifts and scales, by 0.0609 and 1.5305."""
    return str(save_diffusion_model(tmp_path_factory.mktemp("sd3"), "sd3"))


@pytest.fixture
def pictures():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_what_it_encodes_is_scaled_already(sd3, tmp_path, pictures):
    diffusion_model = load_diffusion_model(sd3, autoencoder=tiny_autoencoder(tmp_path))

    latents = diffusion_model.encode(pictures, generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        assert torch.equal(latents, diffusion_model.codec.vae.encoder(pictures * 2 - 1))
    assert diffusion_model.codec.downscale == 2


def test_factors_of_its_own_are_applied_and_undone(sd3, tmp_path, pictures):
    path = tiny_autoencoder(tmp_path, scaling_factor=0.5, shift_factor=0.25)
    codec = load_diffusion_model(sd3, autoencoder=path).codec

    latents = codec.encode(pictures)

    with torch.no_grad():
        own = codec.vae.encoder(pictures)
        torch.testing.assert_close(latents, (own - 0.25) * 0.5)
        torch.testing.assert_close(codec.decode(latents), codec.vae.decoder(own).clamp(-1, 1))


@torch.no_grad()
def test_a_pair_that_means_the_same_gives_the_same_latents(sd3, tmp_path, pictures):
    """A VAE that says 1 of everything, and a tiny autoencoder that says what shift and scale make of that."""
    vae = tiny_vae(shift_factor=0.0609, scaling_factor=1.5305, use_quant_conv=False)
    vae.encoder.conv_out.weight.zero_()
    vae.encoder.conv_out.bias.fill_(1.0)[4:] = -30.0  # the mean's channels, and no deviation
    tiny = AutoencoderTiny.from_pretrained(tiny_autoencoder(tmp_path / "tiny"))
    tiny.encoder.layers[-1].weight.zero_()
    tiny.encoder.layers[-1].bias.fill_((1 - 0.0609) * 1.5305)
    tiny.save_pretrained(tmp_path / "tiny")
    folder = save_diffusion_model(tmp_path / "generator", "sd3")
    vae.save_pretrained(folder / "vae")

    one, two = (
        load_diffusion_model(str(folder), autoencoder=autoencoder).encode(pictures)
        for autoencoder in (None, str(tmp_path / "tiny"))
    )

    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"channels": 16},
            "latents of 16 channels, one cell for 2 pixels .* reads 4 and 2. Give the one of its",
        ),
        ({"blocks": 3}, "latents of 4 channels, one cell for 4 pixels"),
    ],
)
def test_one_of_another_family_is_refused(sd3, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        load_diffusion_model(sd3, autoencoder=tiny_autoencoder(tmp_path, **settings))


def test_what_is_no_tiny_autoencoder_is_refused(sd3, tmp_path):
    with pytest.raises(ValueError, match=r"autoencoder: .*vae` is a AutoencoderKL; expected an AutoencoderTiny"):
        load_diffusion_model(sd3, autoencoder=f"{sd3}/vae")
    with pytest.raises(ValueError, match="has no readable `config.json`"):
        load_diffusion_model(sd3, autoencoder=str(tmp_path))


def test_a_plan_reads_its_config_alone(sd3, tmp_path):
    settings = DiffusionModelConfig(sd3, autoencoder=tiny_autoencoder(tmp_path))

    vae = load_configured(settings, weights=False).codec.vae

    assert isinstance(vae, AutoencoderTiny) and all(value.is_meta for value in vae.parameters())


def test_a_cache_of_the_vae_is_not_one_of_the_tiny_autoencoder(sd3, tmp_path):
    path = tiny_autoencoder(tmp_path / "tiny")
    with LatentWriter(tmp_path / "cache", fingerprint(load_diffusion_model(sd3))):
        pass

    with pytest.raises(ValueError, match="vae is 'AutoencoderKL' there and 'AutoencoderTiny' here"):
        LatentCache(tmp_path / "cache", fingerprint(load_diffusion_model(sd3, autoencoder=path)))


def test_a_training_asks_it_and_never_the_vae(tmp_path):
    settings = {"path": str(tiny_sd_folder(tmp_path / "sd")), "autoencoder": tiny_autoencoder(tmp_path / "tiny")}
    callback = DiffusionFeedbackCallback(feedback_config(diffusion_model=settings))

    trainer, (gradients,) = train(tmp_path, callback)

    assert isinstance(callback.diffusion_model.codec.vae, AutoencoderTiny)
    assert logged(trainer, "feedback_loss")[0] > 0 and gradients["feedback_conditioner.head.weight"].any()
