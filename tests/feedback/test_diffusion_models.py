"""Every known diffusion model, from its folder to the gradient at the context."""

import json

import pytest
import torch

from deem_plugin.feedback import Conditioner, DiffusionFeedback, load_diffusion_model
from deem_plugin.feedback.processes import FlowProcess
from deem_plugin.feedback.sampling import sample_pictures

from .helpers import losses_of_training
from .tiny_diffusion_models import CONTEXT_DIM, DIFFUSION_MODELS, SIZE, save_diffusion_model

FLOWS = {"sd3": 3.0, "flux-dev": 1.0, "flux-schnell": 1.0, "sana": 3.0, "lumina2": 6.0, "auraflow": 1.73}


@pytest.fixture(scope="module", params=DIFFUSION_MODELS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def diffusion_model(name, tmp_path_factory):
    return load_diffusion_model(save_diffusion_model(tmp_path_factory.mktemp(name), name))


@pytest.fixture
def latents():
    return torch.randn(2, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def test_the_gradient_reaches_every_context_token_and_not_the_denoiser(diffusion_model, latents):
    denoiser = diffusion_model.denoiser
    before = {key: value.clone() for key, value in denoiser.model.state_dict().items()}
    context = torch.randn(2, 5, CONTEXT_DIM, generator=torch.Generator().manual_seed(1)).requires_grad_()

    loss = DiffusionFeedback(denoiser)(latents, context, generator=torch.Generator().manual_seed(2))
    loss.mean().backward()

    assert denoiser.context_dim == CONTEXT_DIM and denoiser.channels == 4
    assert loss.shape == (2,) and loss.dtype == torch.float32
    assert (context.grad.abs().sum(-1) > 0).all()
    assert all(p.grad is None and not p.requires_grad for p in denoiser.model.parameters())
    assert not denoiser.model.training
    assert all(torch.equal(value, before[key]) for key, value in denoiser.model.state_dict().items())


def test_noise_and_target_are_those_of_the_prediction_type(diffusion_model, name, latents):
    denoiser = diffusion_model.denoiser
    noise, timesteps = torch.randn_like(latents), torch.tensor([9, 799])

    noisy, target = (
        denoiser.process.noise(latents, noise, timesteps),
        denoiser.process.target(latents, noise, timesteps),
    )

    if name in FLOWS:
        u = (timesteps + 1) / 1000
        sigma = (FLOWS[name] * u / (1 + (FLOWS[name] - 1) * u)).view(-1, 1, 1, 1)
        torch.testing.assert_close(noisy, (1 - sigma) * latents + sigma * noise)
        torch.testing.assert_close(target, noise - latents)
    else:
        alpha = denoiser.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        torch.testing.assert_close(noisy, alpha.sqrt() * latents + (1 - alpha).sqrt() * noise)
        torch.testing.assert_close(target, velocity if name == "sd2" else noise)


def test_a_perfect_prediction_costs_nothing(diffusion_model, latents, monkeypatch):
    denoiser = diffusion_model.denoiser
    noise, timesteps = torch.randn_like(latents), torch.tensor([9, 799])
    perfect = denoiser.process.target(latents, noise, timesteps)
    monkeypatch.setattr(denoiser, "_predict", lambda noisy, times, context, *vector: perfect)

    loss = DiffusionFeedback(denoiser)(latents, torch.zeros(2, 5, CONTEXT_DIM), timesteps=timesteps, noise=noise)

    assert torch.equal(loss, torch.zeros(2))


def test_training_the_conditioner_alone_lowers_the_loss(diffusion_model, latents):
    """The plumbing is right, not only the shapes: 50 steps on one batch, always the same noise."""
    feedback = DiffusionFeedback(diffusion_model.denoiser)
    torch.manual_seed(0)
    tokens, noise, timesteps = torch.randn(2, 5, 8), torch.randn_like(latents), torch.tensor([300, 600])
    conditioner = Conditioner(8, CONTEXT_DIM)

    losses = losses_of_training(
        lambda: feedback(latents, conditioner(tokens), timesteps=timesteps, noise=noise).mean(),
        conditioner.parameters(),
        steps=50,
        learning_rate=0.05,
    )

    assert losses[-1] < losses[0] * 0.995
    assert losses[-1] < min(losses[:20])


def test_pictures_go_to_latents_of_the_networks_shape_and_back(diffusion_model, name):
    codec = diffusion_model.codec
    pictures = torch.rand(2, 3, 2 * SIZE, 2 * SIZE) * 2 - 1

    latents = codec.encode(pictures, noise=torch.zeros(2, 4, SIZE, SIZE))

    encoded = codec.vae.encode(pictures)
    mean = encoded.latent if name == "sana" else encoded.latent_dist.mean
    shift = {"sd3": 0.0609, "flux-dev": 0.1159, "flux-schnell": 0.1159, "lumina2": 0.1159}.get(name, 0.0)
    torch.testing.assert_close(latents, (mean - shift) * codec.vae.config.scaling_factor)
    assert codec.downscale == 2 and codec.decode(latents).shape == pictures.shape


def test_a_flow_network_with_another_noise_schedule_is_refused(tmp_path):
    from diffusers import DDPMScheduler

    save_diffusion_model(tmp_path, "sana")
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")

    with pytest.raises(ValueError, match="flow matching, but its scheduler is a DDPMScheduler"):
        load_diffusion_model(tmp_path)


def test_dynamic_shifting_leaves_the_training_grid_alone(tmp_path):
    process = load_diffusion_model(save_diffusion_model(tmp_path, "flux-dev")).denoiser.process

    assert isinstance(process, FlowProcess)
    torch.testing.assert_close(process.sigmas, torch.arange(1, 1001) / 1000)


@pytest.mark.parametrize(
    ("name", "time"),
    [
        ("sd1", 499),
        ("sd3", 750.0),
        ("flux-schnell", 0.5),
        ("sana", 750.0),
        ("lumina2", 1 - 6 / 7),
        ("auraflow", 0.6337),
    ],
)
def test_each_network_is_told_the_time_as_its_own_pipeline_does(tmp_path, monkeypatch, name, time):
    """Timestep 499 is sigma 0.5 before the shift."""
    denoiser = load_diffusion_model(save_diffusion_model(tmp_path, name)).denoiser
    told, forward = [], denoiser.model.forward

    def listen(latents, timestep=None, *args, **kwargs):
        told.append(timestep)
        return forward(latents, timestep, *args, **kwargs)

    def listen_by_name(latents, *, timestep, **kwargs):
        told.append(timestep)
        return forward(latents, timestep=timestep, **kwargs)

    monkeypatch.setattr(denoiser.model, "forward", listen if name == "sd1" else listen_by_name)
    denoiser(torch.randn(1, 4, SIZE, SIZE), torch.tensor([499]), torch.randn(1, 5, CONTEXT_DIM))

    assert told[0].item() == pytest.approx(time, abs=1e-4)


def test_every_diffusion_model_samples_pictures_reproducibly(diffusion_model, name, monkeypatch):
    if name.startswith("flux"):
        # FLUX's config names no size; the 1024 pixels that it samples by default are too many for a test.
        monkeypatch.setattr(type(diffusion_model.denoiser), "sample_size", SIZE)
    context = torch.randn(2, 5, CONTEXT_DIM, generator=torch.Generator().manual_seed(0))

    first, second = (
        sample_pictures(diffusion_model, context, steps=2, generator=torch.Generator().manual_seed(1))
        for _ in range(2)
    )

    assert first.shape == (2, 3, diffusion_model.image_size, diffusion_model.image_size)
    assert first.min() >= 0 and first.max() <= 1 and first.std() > 0
    assert torch.equal(first, second)


def test_a_flow_that_predicts_perfectly_is_sampled_to_the_very_latents(tmp_path, monkeypatch):
    diffusion_model = load_diffusion_model(save_diffusion_model(tmp_path, "sd3"))
    denoiser = diffusion_model.denoiser
    latents = torch.randn(1, 4, denoiser.sample_size, denoiser.sample_size)

    def perfect(noisy, times, context, vector=None):
        """(x - x0) / sigma is noise - x0; the sampler's times are 1000 sigma."""
        return (noisy - latents) / (times.view(-1, 1, 1, 1) / 1000)

    monkeypatch.setattr(denoiser, "at_times", perfect)
    sampled = sample_pictures(diffusion_model, torch.randn(1, 5, CONTEXT_DIM), steps=4)

    torch.testing.assert_close(sampled, diffusion_model.codec.decode(latents) / 2 + 0.5, atol=1e-4, rtol=0)


def test_flux_packs_latents_as_its_pipeline_does():
    from diffusers import FluxPipeline

    from deem_plugin.feedback.denoisers.transformers import pack, unpack

    latents = torch.randn(2, 4, 6, 8)

    torch.testing.assert_close(pack(latents), FluxPipeline._pack_latents(latents, 2, 4, 6, 8))
    torch.testing.assert_close(unpack(pack(latents), 6, 8), latents)


def test_a_network_that_reads_more_than_noisy_latents_is_refused(tmp_path):
    """As inpainting variants do: 9 channels, 4 of them noisy latents."""
    from diffusers import UNet2DConditionModel

    save_diffusion_model(tmp_path, "sd1")
    config = UNet2DConditionModel.load_config(tmp_path / "unet")
    UNet2DConditionModel.from_config(config, in_channels=9).save_pretrained(tmp_path / "unet")

    with pytest.raises(ValueError, match=r"reads 9 channels.*makes latents of 4"):
        load_diffusion_model(tmp_path)


def test_sdxl_is_told_the_size_of_the_picture_in_pixels(tmp_path):
    denoiser = load_diffusion_model(save_diffusion_model(tmp_path, "sdxl")).denoiser

    told = []
    forward = denoiser.model.forward
    denoiser.model.forward = lambda *args, **kwargs: (
        told.append(kwargs["added_cond_kwargs"]),
        forward(*args, **kwargs),
    )[1]
    inputs = torch.randn(2, 4, SIZE, SIZE), torch.tensor([1, 2]), torch.randn(2, 5, CONTEXT_DIM)

    denoiser(*inputs)
    denoiser(*inputs, torch.ones(2, 12))

    assert told[0]["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    assert told[0]["text_embeds"].shape == (2, 12) and not told[0]["text_embeds"].any()
    assert told[1]["text_embeds"].all()


@pytest.mark.parametrize("name", ["sd3", "flux-dev", "sdxl"])
def test_a_vector_modulates_the_networks_that_take_one_and_is_refused_by_the_others(name, tmp_path):
    denoiser = load_diffusion_model(save_diffusion_model(tmp_path / name, name)).denoiser
    sd1 = load_diffusion_model(save_diffusion_model(tmp_path / "sd1", "sd1")).denoiser
    inputs = torch.randn(2, denoiser.channels, SIZE, SIZE), torch.tensor([100, 900]), torch.randn(2, 5, CONTEXT_DIM)
    vector = torch.randn(2, denoiser.vector_dim, requires_grad=True)

    prediction = denoiser(*inputs, vector)
    prediction.square().mean().backward()

    assert vector.grad.abs().sum(dim=1).min() > 0
    assert not torch.allclose(prediction, denoiser(*inputs))
    with pytest.raises(ValueError, match="nothing modulates a UNet2DConditionModel.*Leave `vector` out"):
        sd1(torch.randn(2, 4, SIZE, SIZE), inputs[1], inputs[2], vector)


def test_the_refiner_of_sdxl_is_refused(tmp_path):
    save_diffusion_model(tmp_path, "sdxl")
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"requires_aesthetics_score": True}))

    with pytest.raises(ValueError, match="refiner.*Give the base model"):
        load_diffusion_model(tmp_path)


def test_a_vae_that_normalises_by_channel_is_refused(tmp_path):
    save_diffusion_model(tmp_path, "sd1")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"latents_mean": [0.0] * 4}))

    with pytest.raises(ValueError, match="latents_mean.*choose another VAE"):
        load_diffusion_model(tmp_path)


def test_more_context_than_lumina_has_positions_for_is_refused(tmp_path):
    denoiser = load_diffusion_model(save_diffusion_model(tmp_path, "lumina2")).denoiser

    with pytest.raises(ValueError, match=r"20 tokens.*15 at most.*num_queries"):
        denoiser(torch.randn(1, 4, SIZE, SIZE), torch.tensor([1]), torch.randn(1, 20, CONTEXT_DIM))
