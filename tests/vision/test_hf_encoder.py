"""Vision encoders of transformers become towers, or are refused when they are built."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    CLIPImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    Qwen2Config,
    __version__,
)

from deem_plugin.vision import DeemVisionConfig, DeemVisionTower, build_vision_tower
from deem_plugin.vision.hf_encoder import own_image_size
from tests.vision.hf_models import TOKENS, image_encoders, tiny_config

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- begin of the generated list of encoders -->", "<!-- end of the generated list of encoders -->"


def saved(config, folder):
    """The model of a configuration with new weights, and what a published one has beside it."""
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    model.save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    return model


def by_name(model_type, folder):
    """The tower of a tiny model that was saved to a folder."""
    config = tiny_config(model_type)
    model = saved(config, folder)
    image_size = None if own_image_size(config) else 128
    return build_vision_tower(f"deem:{folder}", num_queries=0, image_size=image_size).eval(), model


def check(tower):
    """Tokens in the order of the grid, layers and pooled vector of the promised shapes, gradient up to the pixels."""
    config = tower.config
    pixels = torch.randn(2, 3, config.image_size, config.image_size)
    output = tower(pixels, output_hidden_states=True)

    assert config.num_image_tokens == config.grid_size**2
    assert output.last_hidden_state.shape == (2, config.num_image_tokens, config.hidden_size)
    assert output.pooler_output.shape == (2, config.hidden_size)
    assert len(output.hidden_states) == tower.num_layers
    assert all(state.shape == output.last_hidden_state.shape for state in output.hidden_states)
    (output.last_hidden_state * torch.randn_like(output.last_hidden_state)).sum().backward()
    assert tower.get_input_embeddings().weight.grad.abs().sum() > 0


@pytest.mark.parametrize("model_type", TOKENS)
def test_encoder_with_tokens_becomes_a_tower_by_the_name_of_its_folder(model_type, tmp_path):
    tower, model = by_name(model_type, tmp_path)
    check(tower)
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in tower.encoder.model.state_dict().items())

    # The first layer that there is depends on the pixels of a patch there most.
    pixels = torch.randn(1, 3, tower.config.image_size, tower.config.image_size)
    changed = pixels.clone()
    stride, side = tower.config.patch_size, tower.config.grid_size
    changed[:, :, 2 * stride : 3 * stride, stride : 2 * stride] += 1
    with torch.no_grad():
        before, after = (tower.encoder(value).layers[0].patches for value in (pixels, changed))
    assert (after - before).norm(dim=2).argmax() == 2 * side + 1


def test_the_vision_part_of_a_vision_language_model_is_taken(tmp_path):
    text = Qwen2Config(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    text.num_key_value_heads = 2
    vision = tiny_config("internvl_vision")
    full = InternVLForConditionalGeneration(
        InternVLConfig(vision_config=vision, text_config=text, image_token_id=3)
    ).eval()
    full.save_pretrained(tmp_path)
    CLIPImageProcessor().save_pretrained(tmp_path)

    tower = build_vision_tower(f"deem:{tmp_path}", num_queries=0).eval()

    pixels = torch.randn(1, 3, tower.config.image_size, tower.config.image_size)
    with torch.no_grad():
        assert torch.equal(tower(pixels).last_hidden_state, full.model.vision_tower(pixels).last_hidden_state[:, 1:])


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("vit_mae", r"returned ViTMAEModelOutput with a `last_hidden_state` of shape \(3, 17, 32\).*row by row"),
        ("yolos", r"`last_hidden_state` of shape \(3, 165, 32\) for 3 pictures"),
        ("videomae", "given such pictures alone, it stops with ValueError: not enough values to unpack"),
        ("qwen2_5_vl_vision", "it stops with"),
        ("clip_text_model", "it stops with ValueError"),
    ],
)
def test_model_without_a_grid_of_tokens_is_refused(model_type, message):
    with pytest.raises(ValueError, match=f"Cannot use a model of type '{model_type}' as encoder.*{message}"):
        DeemVisionConfig(encoder_config=tiny_config(model_type), image_size=128)


def test_resolution_that_the_encoder_cannot_interpolate_to_is_refused():
    with pytest.raises(ValueError, match="encoder of pictures of 64 pixels.*Give another `image_size`"):
        DeemVisionConfig(encoder_config=tiny_config("aimv2_vision_model"), image_size=64)


def test_encoder_that_does_not_say_its_resolution_must_be_told():
    with pytest.raises(ValueError, match="type 'resnet' does not say for which square pictures it was made. Give"):
        DeemVisionConfig(encoder_config=tiny_config("resnet"))


def test_what_is_measured_is_saved_and_not_measured_again(tmp_path, monkeypatch):
    config = DeemVisionConfig(encoder_config=tiny_config("vit"))
    config.save_pretrained(tmp_path)
    monkeypatch.setattr("deem_plugin.vision.configuration.measure", None)
    assert DeemVisionConfig.from_pretrained(tmp_path).encoder_dim == config.encoder_dim == 32


def listing() -> str:
    """What becomes of each image encoder of transformers, for the docs."""
    groups = {"Tokens, and those of each layer": [], "Tokens of the last layer alone": [], "Refused": []}
    for model_type in image_encoders():
        config = tiny_config(model_type)
        if hasattr(config, "vision_config"):  # a larger model, whose vision part is on the list
            continue
        try:
            tower = DeemVisionTower(DeemVisionConfig(encoder_config=config, image_size=own_image_size(config) or 128))
        except ValueError as error:
            assert "Cannot use a model of type" in str(error)
            groups["Refused"].append(model_type)
            continue
        check(tower.eval())
        groups[list(groups)[tower.num_layers == 1]].append(model_type)
    found = "\n".join(f"- {group}: {', '.join(f'`{name}`' for name in names)}." for group, names in groups.items())
    return f"Tried with transformers {__version__}, with random weights:\n\n{found}\n"


@pytest.mark.slow
def test_the_docs_list_what_becomes_of_each_encoder():
    """Make the list again by `python -m tests.vision.test_hf_encoder`."""
    shown = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()
    if f"transformers {__version__}," not in shown:
        pytest.skip(f"the list was made with another release than {__version__}")
    assert shown == listing().strip()


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{head}{BEGIN}\n{listing()}{END}{tail}", encoding="utf-8")
