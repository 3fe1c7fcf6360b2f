"""What is read from tokens: all of it where it is there, none of it where it is not."""

import pytest
import torch

from deem_plugin.data.scenes import SHAPES, TEXTURES
from deem_plugin.demo.generator import shipped_generator
from deem_plugin.demo.models import build_vlm
from deem_plugin.demo.probes import SHOWN, fit_reader, look_into, probe, visual_tokens
from deem_plugin.demo.sets import probe_scenes
from deem_plugin.feedback.generator import load_generator


@pytest.fixture(scope="module")
def scenes_and_pictures():
    return probe_scenes(200)


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


def test_reader_leaves_generator_and_tokens_alone_and_gives_the_same_twice():
    _, pictures = probe_scenes(70)
    generator = load_generator(str(shipped_generator()))
    tokens = torch.randn(70, 8, 64, generator=torch.Generator().manual_seed(0))
    before = [parameter.clone() for parameter in generator.denoiser.model.parameters()]
    first, second = (fit_reader(generator, tokens, pictures, steps=2) for _ in range(2))
    assert torch.equal(first.head.weight, second.head.weight)
    assert all(torch.equal(a, b) for a, b in zip(before, generator.denoiser.model.parameters(), strict=True))


def test_report_of_a_model_has_probes_and_pictures(scenes_and_pictures):
    scenes, pictures = scenes_and_pictures
    model, processor = build_vlm(0)
    report = look_into(
        model, processor, load_generator(str(shipped_generator())), scenes[:40], pictures[:40], fast=True
    )
    assert report.reconstructions.shape == (SHOWN, 3, 16, 16)
    assert set(report.probes) == {"shape", "background", "position", "size"}
    assert report.denoising_error > 0
