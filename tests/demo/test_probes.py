"""What is read from tokens: all of it where it is there, none of it where it is not."""

import pytest
import torch

from deem_plugin.demo.diffusion_model import load_code, shipped_diffusion_model
from deem_plugin.demo.models import build_vlm
from deem_plugin.demo.probes import SHOWN, look_into, probe, read_context, reconstruct, visual_tokens
from deem_plugin.demo.scenes import SHAPES, TEXTURES
from deem_plugin.demo.sets import probe_scenes
from deem_plugin.feedback.diffusion_model import load_diffusion_model


@pytest.fixture(scope="module")
def scenes_and_pictures():
    return probe_scenes(200)


@pytest.fixture(scope="module")
def diffusion_model():
    return load_diffusion_model(str(shipped_diffusion_model()))


@pytest.fixture(scope="module")
def code():
    return load_code(shipped_diffusion_model())


def test_probes_read_what_the_tokens_hold(scenes_and_pictures):
    scenes, _ = scenes_and_pictures
    one_hot = torch.nn.functional.one_hot
    quantities = torch.stack([scenes.x, scenes.y, scenes.scale], dim=1)
    values = torch.cat([one_hot(scenes.shape, len(SHAPES)), one_hot(scenes.texture, len(TEXTURES)), quantities], dim=1)
    scores = probe(values.unsqueeze(1).repeat(1, 8, 1), scenes)
    assert scores["shape"] == scores["background"] == 1.0
    assert min(scores["position"], scores["size"]) > 0.9


def test_probes_read_nothing_from_noise(scenes_and_pictures):
    scenes, _ = scenes_and_pictures
    scores = probe(torch.randn(200, 8, 4, generator=torch.Generator().manual_seed(0)), scenes)
    assert scores["shape"] < 0.35
    assert max(scores["position"], scores["size"]) < 0.2


def test_visual_tokens_are_those_of_the_tower(scenes_and_pictures):
    _, pictures = scenes_and_pictures
    model, processor = build_vlm(0)
    tokens = visual_tokens(model, processor, pictures[:5], batch_size=2)
    with torch.no_grad():
        pixel_values = processor.image_processor(list(pictures[:5]), do_rescale=False, return_tensors="pt")
        expected = model.model.vision_tower(**pixel_values).last_hidden_state
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)


def test_context_is_read_where_the_tokens_hold_it(diffusion_model, code):
    _, pictures = probe_scenes(300)
    latents = diffusion_model.encode(pictures)
    with torch.no_grad():
        codes = code(latents)
    context = read_context(code, codes * 3 + 1, latents[:200] / 2 + 0.5)
    assert context.shape == (100, 8, 64)
    assert (context - codes[200:]).square().mean() < 0.2 * codes[200:].square().mean()


def test_reconstructions_from_the_code_show_the_picture(diffusion_model, code):
    _, pictures = probe_scenes(40)
    latents = diffusion_model.encode(pictures)
    with torch.no_grad():
        reconstructed = reconstruct(diffusion_model, code(latents))
    errors = (reconstructed - (latents / 2 + 0.5)).square().mean(dim=(1, 2, 3))
    mismatched = (reconstructed - (latents / 2 + 0.5).roll(1, 0)).square().mean(dim=(1, 2, 3))
    assert errors.mean() < 0.4 * mismatched.mean()


def test_report_of_a_model_has_probes_and_pictures(scenes_and_pictures, diffusion_model, code):
    scenes, pictures = scenes_and_pictures
    model, processor = build_vlm(0)
    report = look_into(model, processor, diffusion_model, code, scenes[:40], pictures[:40])
    assert report.reconstructions.shape == (SHOWN, 3, 16, 16)
    assert set(report.probes) == {"shape", "background", "position", "size"}
    assert report.denoising_error > 0
