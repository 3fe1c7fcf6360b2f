"""The protocol of the LLaVA code base, as its `llava_arch.py` and `train.py` use it."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from deem_plugin.vision.llava import LlavaTower
from tests.vision.towers import RESAMPLER, tiny_tower


def llava_args(layer=-2, feature="patch"):
    return SimpleNamespace(mm_vision_select_layer=layer, mm_vision_select_feature=feature)


@pytest.fixture
def clip_folder(tmp_path):
    tiny_tower("clip").save_pretrained(tmp_path)
    return f"deem:{tmp_path}"


@pytest.fixture
def query_folder(tmp_path):
    tiny_tower("clip", **RESAMPLER).save_pretrained(tmp_path)
    return f"deem:{tmp_path}"


def test_features_are_the_patches_of_the_selected_layer(clip_folder):
    tower = LlavaTower(clip_folder, llava_args())
    images = torch.randn(2, 3, 32, 32)
    features = tower(images)
    assert features.shape == (2, tower.num_patches, tower.hidden_size) == (2, 16, 32)
    expected = tower.vision_tower(images, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(features, expected)
    assert LlavaTower(clip_folder, llava_args(feature="cls_patch"))(images).shape == (2, 17, 32)
    assert tower.num_patches_per_side == 4


def test_list_of_images_gives_a_list(clip_folder):
    tower = LlavaTower(clip_folder, llava_args())
    images = torch.randn(2, 3, 32, 32)
    features = tower(list(images))
    assert [f.shape for f in features] == [(1, 16, 32)] * 2
    torch.testing.assert_close(torch.cat(features), tower(images))


def test_gradients_pass_and_nothing_is_frozen(clip_folder):
    tower = LlavaTower(clip_folder, llava_args())
    tower(torch.randn(1, 3, 32, 32)).square().sum().backward()
    assert all(p.requires_grad for p in tower.parameters())
    assert tower.vision_tower.get_input_embeddings().weight.grad.abs().sum() > 0


def test_sizes_are_known_before_the_weights(clip_folder):
    tower = LlavaTower(clip_folder, llava_args(), delay_load=True)
    assert not tower.is_loaded and not list(tower.parameters())
    assert (tower.hidden_size, tower.num_patches) == (32, 16)
    tower.load_model()
    loaded = tower.vision_tower
    tower.load_model()
    assert tower.is_loaded and tower.vision_tower is loaded


def test_images_come_in_any_dtype_and_features_go_out_in_theirs(clip_folder):
    tower = LlavaTower(clip_folder, llava_args())
    assert tower(torch.randn(1, 3, 32, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert tower.dtype == torch.float32 and tower.device == torch.device("cpu")
    assert torch.equal(tower.dummy_feature, torch.zeros(1, 32))


def test_image_processor_makes_what_the_tower_reads(clip_folder):
    tower = LlavaTower(clip_folder, llava_args())
    image = Image.new("RGB", (50, 40), "white")
    pixels = tower.image_processor.preprocess(image, return_tensors="pt")["pixel_values"]
    assert tower(pixels).shape == (1, 16, 32)
    assert tower.image_processor.crop_size["height"] == 32  # LLaVA pads and tiles by this


def test_queries_are_patches_without_a_grid(query_folder):
    tower = LlavaTower(query_folder, llava_args(layer=-1))
    assert tower(torch.randn(1, 3, 32, 32)).shape == (1, tower.num_patches, tower.hidden_size) == (1, 5, 24)
    with pytest.raises(ValueError, match="returns 5 queries, which form no grid"):
        tower.num_patches_per_side  # noqa: B018


def test_unknown_feature_is_refused(clip_folder):
    with pytest.raises(ValueError, match="must be 'patch' or 'cls_patch', got 'cls'"):
        LlavaTower(clip_folder, llava_args(feature="cls"))
