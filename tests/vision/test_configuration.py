"""The configuration derives what hosts read, and refuses what cannot be."""

import pytest
from transformers import AutoConfig

from deem_plugin.vision import DeemVisionConfig
from tests.vision.towers import RESAMPLER, encoder_options


def test_default_is_the_encoder_of_the_paper():
    config = DeemVisionConfig(num_queries=77)
    assert config.open_clip_config["timm_model_name"] == "convnext_base"
    assert (config.image_size, config.patch_size, config.grid_size) == (320, 16, 20)
    assert (config.encoder_dim, config.hidden_size, config.num_image_tokens) == (1024, 768, 77)


@pytest.mark.parametrize("encoder", ["convnext", "siglip2"])
def test_config_survives_saving(encoder, tmp_path):
    config = DeemVisionConfig(**(encoder_options(encoder) | RESAMPLER))
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, DeemVisionConfig)
    ignored = ("transformers_version", "_name_or_path")
    assert {k: v for k, v in loaded.to_dict().items() if k not in ignored} == {
        k: v for k, v in config.to_dict().items() if k not in ignored
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (encoder_options("clip") | encoder_options("convnext"), "both `encoder_config` and `open_clip_config`"),
        ({"open_clip_config": {"widht": 3}}, "Unknown keys in `open_clip_config`: widht. Known: .*width"),
        ({"open_clip_config": {"image_size": [224, 336]}}, r"square images, got `image_size`=\[224, 336\]"),
        (encoder_options("convnext") | {"token_stage": 4}, "`token_stage` must be 0, 1, 2 or 3, got 4"),
        (
            {"open_clip_config": {"timm_model_name": "convnext_base", "image_size": 336 - 8}},
            "multiple of its total stride 32, got 328. Choose for example 320",
        ),
        (encoder_options("clip") | {"hidden_size": 48}, "`hidden_size` follows from the encoder and is 32, got 48"),
    ],
)
def test_impossible_towers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DeemVisionConfig(**options)
