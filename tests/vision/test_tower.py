"""The tower against the official numbers, and its promises to the models that hold it."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import interpolate

from deem_plugin.vision.configuration import DeemVisionConfig
from deem_plugin.vision.tower import DeemVisionTower, sincos_position_embedding
from tests.parity_weights import parity_tower_config, tower_weights


def relative_error(value, expected):
    return ((value - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def parity_weights_file(shared_dir):
    return load_file(shared_dir / "parity" / "f2_weights.safetensors")


@pytest.fixture
def official_tower(parity_weights_file):
    tower = DeemVisionTower(DeemVisionConfig(**parity_tower_config())).eval()
    tower.load_state_dict(tower_weights(parity_weights_file), strict=True)
    return tower


@pytest.fixture(scope="module")
def full(shared_dir):
    return load_file(shared_dir / "parity" / "f2_full.safetensors")


def test_tower_gives_the_official_features(official_tower, full):
    encoded = official_tower.encoder(full["image_normalised"])
    for stage, stride in enumerate((4, 8, 16, 32)):
        expected = full[f"sniffer.hidden_states.{stage}"]
        torch.testing.assert_close(encoded.maps[f"stride{stride}"], expected, atol=1e-5, rtol=0)
    tokens = torch.cat(encoded.tokens, dim=1)
    torch.testing.assert_close(tokens, full["sniffer.last_hidden_state"], atol=1e-5, rtol=0)
    normed = official_tower.position_norm(official_tower.position_proj(tokens))
    torch.testing.assert_close(normed, full["pos_ln_out"], atol=1e-5, rtol=0)

    inputs = official_tower.resampler_inputs(encoded, torch.ones(2, 16, 1))
    torch.testing.assert_close(inputs, full["qformer_inputs(post_ln_out)"], atol=1e-5, rtol=0)
    out = official_tower(full["image_normalised"], region_masks=full["input.image_mask"].float())
    torch.testing.assert_close(out.last_hidden_state, full["perceiver_out"], atol=1e-5, rtol=0)


def test_tower_gives_the_official_gradients(official_tower, full):
    out = official_tower(full["image_normalised"])
    out.last_hidden_state.backward(full["grad.perceiver_out"])

    names = [
        "perceiver_resampler.queries",
        "sniffer.vision_model.adapter_c4.weight",
        "sniffer.vision_model.adapter_cls.weight",
        "sniffer.vision_model.visual.trunk.stem.0.weight",
    ]
    for name in names:
        (ours,) = tower_weights({name: None})
        gradient = official_tower.get_parameter(ours).grad
        assert relative_error(gradient, full[f"grad.param.{name}"]) < 1e-4, name


def test_regions_give_the_official_queries_where_the_rules_agree(official_tower, shared_dir, full):
    partial = load_file(shared_dir / "parity" / "f2_partial_mmfs_random.safetensors")
    # The official rule, bilinear > 0 without antialiasing, loses small regions; ours does not. On the grid they agree.
    on_grid = (interpolate(partial["input.image_mask"].float(), size=(4, 4), mode="bilinear") > 0).float()

    out = official_tower(full["image_normalised"], region_masks=on_grid)

    torch.testing.assert_close(out.last_hidden_state, partial["perceiver_out"], atol=1e-5, rtol=0)


def test_position_embedding_is_the_official_one(parity_weights_file):
    expected = parity_weights_file["pos_embed"][1:]
    torch.testing.assert_close(sincos_position_embedding(64, 16, 16), expected, atol=1e-6, rtol=0)
