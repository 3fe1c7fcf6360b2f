import pytest
import torch
from transformers import CLIPVisionModel, LlavaConfig, SiglipVisionConfig, SiglipVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from deem_plugin.feedback.views import ImageViews, TokenReading, call_arguments, image_views

from ..tiny import tiny_clip_config


@pytest.fixture
def output():
    states = tuple(torch.randn(2, 5, 4) for _ in range(3))
    return BaseModelOutputWithPooling(last_hidden_state=states[-1] + 1, hidden_states=states)


@pytest.mark.parametrize(
    ("layer", "strategy", "expected"),
    [
        (-2, "default", lambda out: out.hidden_states[-2][:, 1:]),
        (-2, "full", lambda out: out.hidden_states[-2]),
        ([-2, -1], "full", lambda out: torch.cat([out.hidden_states[-2], out.hidden_states[-1]], -1)),
        (0, "full", lambda out: out.hidden_states[0]),
    ],
)
def test_the_feedback_reads_the_tokens_that_llava_reads(output, layer, strategy, expected):
    config = LlavaConfig(vision_feature_layer=layer, vision_feature_select_strategy=strategy)

    assert torch.equal(TokenReading.of(config).select(output), expected(output))


def test_without_a_named_layer_the_last_hidden_state_is_read(output):
    assert torch.equal(TokenReading().select(output), output.last_hidden_state)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_stock_tower_is_taken_apart_into_tokens_and_pictures(kind):
    if kind == "clip":
        tower = CLIPVisionModel(tiny_clip_config())
    else:
        tower = SiglipVisionModel(SiglipVisionConfig(**tiny_clip_config().to_diff_dict() | {"model_type": "siglip"}))
    pixel_values = torch.randn(3, 3, 32, 32)

    inputs = call_arguments(tower, (pixel_values,), {"output_hidden_states": True})
    views = image_views(inputs, tower(pixel_values, output_hidden_states=True), TokenReading([-1]))

    assert len(views.tokens) == len(views.pictures) == 3
    assert views.tokens[0].shape == (17 if kind == "clip" else 16, 32) and views.tokens[0].requires_grad
    assert torch.equal(torch.stack(views.pictures), pixel_values)
    tokens, mask = views.padded_tokens()
    assert tokens.shape[0] == 3 and mask is None


def test_images_may_have_different_numbers_of_tokens():
    views = ImageViews([torch.ones(2, 4), torch.ones(5, 4)], [torch.zeros(3, 8, 8), torch.zeros(3, 16, 8)])

    tokens, mask = views.padded_tokens()

    assert tokens.shape == (2, 5, 4)
    assert mask.tolist() == [[True, True, False, False, False], [True] * 5]
    assert tokens[0, 2:].abs().sum() == 0


@pytest.mark.parametrize("name", ["grid_thw", "image_sizes", "spatial_shapes", "patch_attention_mask"])
def test_a_layout_that_is_not_known_is_refused_by_name(output, name):
    with pytest.raises(ValueError, match=f"`{name}`.*pixel_values"):
        image_views({"pixel_values": torch.zeros(2, 3, 8, 8), name: torch.ones(2)}, output, TokenReading())


def test_pixel_values_that_are_no_pictures_are_refused(output):
    with pytest.raises(ValueError, match=r"shape \(2, 729, 588\)"):
        image_views({"pixel_values": torch.zeros(2, 729, 588)}, output, TokenReading())
