"""The tower against the official numbers, and its promises to the models that hold it."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import interpolate

from deem_plugin.vision.configuration import DeemVisionConfig
from deem_plugin.vision.grids import region_to_patches, sincos_position_embedding
from deem_plugin.vision.tower import DeemVisionTower
from tests.parity_weights import parity_tower_config, tower_weights
from tests.vision.towers import RESAMPLER, tiny_pixels, tiny_tower


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


@pytest.mark.parametrize("options", [{}, RESAMPLER], ids=["patches", "queries"])
def test_region_of_one_pixel_is_seen(options):
    tower = tiny_tower("convnext", **options).eval()
    pixels = tiny_pixels(tower)
    mask = torch.zeros(2, 1, 64, 64)
    mask[:, :, 17, 40] = 1  # row 1, column 2 of the 4 x 4 grid

    touched = region_to_patches(mask, 4, 4)

    assert touched.flatten(1).nonzero().tolist() == [[0, 6], [1, 6]]
    looked = tower(pixels, region_masks=mask).last_hidden_state
    assert not torch.equal(looked, tower(pixels).last_hidden_state)
    if not options:
        torch.testing.assert_close(looked[:, 6], tower(pixels).last_hidden_state[:, 6])
        assert looked.abs().sum(-1).count_nonzero() == 2


def test_region_of_everything_changes_nothing():
    tower = tiny_tower("siglip").eval()
    pixels = tiny_pixels(tower)
    assert torch.equal(
        tower(pixels, region_masks=torch.ones(2, 1, 9, 7)).last_hidden_state, tower(pixels).last_hidden_state
    )


def test_empty_region_is_an_error_that_counts():
    tower = tiny_tower()
    mask = torch.stack([torch.ones(1, 8, 8), torch.zeros(1, 8, 8)])
    with pytest.raises(ValueError, match="1 of 2 region masks are empty"):
        tower(tiny_pixels(tower), region_masks=mask)


@pytest.mark.parametrize(
    ("request_", "returned"), [(True, [0, 1, 2, 3]), (0, [0]), (-2, [2]), ([-2, -1], [2, 3]), ([1, -4], [0, 1])]
)
def test_layers_are_returned_for_every_way_of_asking(request_, returned):
    tower = tiny_tower("clip").eval()
    states = tower(tiny_pixels(tower), output_hidden_states=request_).hidden_states
    assert [index for index, state in enumerate(states) if state is not None] == returned
    assert len(states) == 4


@pytest.mark.parametrize("request_", [None, False])
def test_layers_are_left_out_unless_asked_for(request_):
    tower = tiny_tower("clip").eval()
    assert tower(tiny_pixels(tower), output_hidden_states=request_).hidden_states is None


@pytest.mark.parametrize("shape", [(1, 3, 64, 96), (1, 3, 128, 128), (1, 5, 3, 64, 64), (1, 1, 64, 64)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"shape \(batch, 3, 64, 64\), got \(1, .*build_image_processor"):
        tiny_tower("convnext")(torch.zeros(shape))


def test_return_dict_false_gives_a_tuple():
    tower = tiny_tower("clip").eval()
    last_hidden_state, *_ = tower(tiny_pixels(tower), return_dict=False)
    assert last_hidden_state.shape == (2, 16, 32)


@pytest.mark.parametrize("tower_options", [("convnext", {}), ("clip", RESAMPLER)])
def test_tower_with_one_output_says_so(tower_options):
    encoder, options = tower_options
    tower = tiny_tower(encoder, **options)
    with pytest.raises(
        ValueError, match="one output, layer -1, but layer -2 was asked for. Set `vision_feature_layer`"
    ):
        tower(tiny_pixels(tower), output_hidden_states=-2)


def test_layer_beyond_the_last_is_refused_with_the_range():
    tower = tiny_tower("clip")
    with pytest.raises(ValueError, match="layers -4 to 3, but layer -11 was asked for"):
        tower(tiny_pixels(tower), output_hidden_states=[-2, -11])


def test_tower_runs_in_bfloat16():
    tower = tiny_tower("convnext", **RESAMPLER).to(torch.bfloat16).eval()
    output = tower(tiny_pixels(tower).bfloat16(), region_masks=torch.ones(2, 1, 8, 8))
    assert output.last_hidden_state.dtype == torch.bfloat16
