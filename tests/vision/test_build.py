"""Towers by name: which weights they get, and what is said about names that mean nothing."""

import json

import open_clip
import pytest
import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionModel,
    Dinov2Model,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    ViTConfig,
)

from deem_plugin.vision import DeemVisionTower, build_image_processor, build_vision_tower
from tests.tiny import tiny_full_clip
from tests.vision.towers import OPEN_CLIP_VIT, VIT, encoder_options, realigned, tiny_pixels, tiny_tower

TEXT = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}


@pytest.fixture(scope="module", autouse=True)
def tiny_open_clip_models(tmp_path_factory):
    """Teaches open_clip two tiny models, through its own registry."""
    folder = tmp_path_factory.mktemp("open_clip")
    models = {
        "deem-test-vit": {"vision_cfg": OPEN_CLIP_VIT, "quick_gelu": True},
        "deem-test-resnet": {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}},
    }
    for name, config in models.items():
        (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 16, "text_cfg": TEXT} | config))
    open_clip.add_model_config(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_open_clip_models):
    """A checkpoint file of the tiny open_clip model, and the model."""
    torch.manual_seed(3)
    model = open_clip.create_model("deem-test-vit")
    path = tmp_path_factory.mktemp("checkpoint") / "model.pt"
    torch.save(model.state_dict(), path)
    return path, model


def test_deem_is_the_tower_of_the_paper():
    with torch.device("meta"):
        tower = build_vision_tower("deem")
    config = tower.config
    assert config.open_clip_config["timm_model_name"] == "convnext_base"
    assert config.open_clip_config["timm_drop_path"] == 0.1
    assert (config.image_size, config.encoder_dim, config.num_queries, config.hidden_size) == (320, 1024, 77, 768)
    assert len(tower.resampler.layers) == 12
    assert sum(layer.cross_attention is not None for layer in tower.resampler.layers) == 6


def test_open_clip_checkpoint_is_loaded_into_the_encoder(checkpoint):
    path, model = checkpoint
    tower = build_vision_tower("deem:deem-test-vit", pretrained=str(path), num_queries=0).eval()
    assert tower.config.open_clip_config["quick_gelu"]
    pixels = tiny_pixels(tower)
    with torch.no_grad():
        expected = model.visual.eval()(pixels)
        torch.testing.assert_close(tower(pixels).pooler_output @ model.visual.proj, expected)


def test_position_embedding_follows_the_image_size(checkpoint):
    tower = build_vision_tower("deem:deem-test-vit", pretrained=str(checkpoint[0]), num_queries=0, image_size=64)
    assert tower(tiny_pixels(tower)).last_hidden_state.shape == (2, 64, 32)


def test_convnext_weights_of_open_clip_fit_by_name():
    """The names are those of open_clip's checkpoints; only the projection to the contrastive space stays behind."""
    with torch.device("meta"):
        tower = build_vision_tower("deem:convnext_tiny", num_queries=0)
        visual = open_clip.create_model("convnext_tiny", device="meta").visual
    theirs = {name.removeprefix("trunk.") for name in visual.state_dict() if not name.startswith("head.")}
    assert theirs == set(tower.encoder.trunk.state_dict())


def test_open_clip_checkpoint_with_a_missing_weight_is_an_error(checkpoint, tmp_path):
    weights = dict(checkpoint[1].state_dict())
    del weights["visual.ln_pre.weight"]
    torch.save(weights, tmp_path / "broken.pt")
    with pytest.raises(RuntimeError, match="visual.ln_pre.weight"):
        build_vision_tower("deem:deem-test-vit", pretrained=str(tmp_path / "broken.pt"))


def test_vision_part_of_a_full_clip_is_taken(tmp_path):
    full = tiny_full_clip(tmp_path).eval()
    tower = build_vision_tower(f"deem:{tmp_path}", num_queries=0).eval()
    pixels = tiny_pixels(tower)
    assert torch.equal(tower(pixels).pooler_output, full.vision_model(pixels).pooler_output)


def test_vision_part_of_a_full_siglip_is_taken_with_its_normalisation(tmp_path):
    torch.manual_seed(0)
    text = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 8, "projection_size": 32}
    full = SiglipModel(SiglipConfig(text_config=text, vision_config=dict(VIT))).eval()
    full.save_pretrained(tmp_path)
    SiglipImageProcessor(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)

    tower = build_vision_tower(f"deem:{tmp_path}", num_queries=0).eval()

    pixels = tiny_pixels(tower)
    expected = full.vision_model(pixels).last_hidden_state
    assert torch.equal(tower(pixels).last_hidden_state, expected)
    assert list(tower.config.image_mean) == [0.1, 0.2, 0.3]
    assert list(tower.config.image_std) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(("encoder", "model_class"), [("clip", CLIPVisionModel), ("dinov2", Dinov2Model)])
def test_vision_models_are_taken_as_they_are(encoder, model_class, tmp_path):
    torch.manual_seed(0)
    stock = model_class(encoder_options(encoder)["encoder_config"]).eval()
    stock.save_pretrained(tmp_path)
    CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    tower = build_vision_tower(f"deem:{tmp_path}", num_queries=0).eval()
    pixels = tiny_pixels(tower)
    assert torch.equal(tower(pixels).last_hidden_state, stock(pixels).last_hidden_state[:, 1:])
    assert tower.config.image_mean == [0.1, 0.2, 0.3]


def test_false_gives_new_weights(tmp_path):
    full = tiny_full_clip(tmp_path)
    tower = build_vision_tower(f"deem:{tmp_path}", num_queries=0, pretrained=False)
    name = "embeddings.patch_embedding.weight"
    assert not torch.equal(tower.encoder.model.get_parameter(name), full.vision_model.get_parameter(name))


def test_weights_that_do_not_fit_the_config_are_an_error(tmp_path):
    tiny_full_clip(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"do not fit its config. Missing: \['vision_model.*16 in all"):
        build_vision_tower(f"deem:{tmp_path}")


def test_saved_tower_is_taken_as_it_is(tmp_path):
    tower = tiny_tower("convnext").eval()
    tower.save_pretrained(tmp_path)
    loaded = build_vision_tower(f"deem:{tmp_path}")
    assert isinstance(loaded, DeemVisionTower) and loaded.training
    pixels = tiny_pixels(tower)
    assert torch.equal(realigned(loaded).eval()(pixels).last_hidden_state, tower(pixels).last_hidden_state)
    with pytest.raises(ValueError, match="tower for images of 64 pixels, got `image_size=128`"):
        build_vision_tower(f"deem:{tmp_path}", image_size=128)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("clip", {}, "called 'deem' or 'deem:<encoder>', got 'clip'"),
        ("deem:", {}, "called 'deem' or 'deem:<encoder>', got 'deem:'"),
        ("deem:convnext_bse_w_320", {}, "Unknown encoder 'convnext_bse_w_320'.*convnext_base_w_320"),
        ("deem:nobody/nothing", {}, "Found no model at 'nobody/nothing'"),
        ("deem", {"pretrained": "laion2b"}, "must be a file or a tag of open_clip, got 'laion2b'. Tags: .*laion_aes"),
        ("deem", {"pretrained": True}, "`pretrained` of convnext_base_w_320 must be .*, got True. Tags: .*laion_aes"),
        ("deem:deem-test-resnet", {}, "ConvNeXts and plain vision transformers can be the encoder"),
    ],
)
def test_names_that_mean_nothing_are_refused_with_the_choices(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_vision_tower(name, **options)


def test_model_with_an_unknown_normalisation_is_refused(tmp_path):
    ViTConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not say how pictures are normalised for its weights.*image processor"):
        build_vision_tower(f"deem:{tmp_path}")
    assert build_vision_tower(f"deem:{tmp_path}", pretrained=False).config.encoder_dim == 768


def test_tag_for_a_folder_is_refused(tmp_path):
    tiny_full_clip(tmp_path)
    with pytest.raises(ValueError, match="brings its own weights"):
        build_vision_tower(f"deem:{tmp_path}", pretrained="openai")


def test_image_processor_fits_the_tower():
    tower = tiny_tower("clip", image_mean=[0.1, 0.2, 0.3])
    processor = build_image_processor(tower)
    assert processor.crop_size == {"height": 32, "width": 32}
    assert tuple(processor.image_mean) == (0.1, 0.2, 0.3)
    assert build_image_processor(tower.config).to_dict() == processor.to_dict()
