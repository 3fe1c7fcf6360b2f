"""Every encoder keeps the contract: shapes, class tokens, gradients, checkpointing, saving."""

import pytest
import torch
from transformers import AutoModel, CLIPVisionModel

from deem_plugin.vision import DeemVisionConfig, DeemVisionTower
from tests.vision.towers import (
    ENCODERS,
    RESAMPLER,
    VIT,
    encoder_options,
    realigned,
    tiny_pixels,
    tiny_tower,
)

every_encoder = pytest.mark.parametrize("encoder", ENCODERS)


@every_encoder
@pytest.mark.parametrize("options", [{}, RESAMPLER], ids=["patches", "queries"])
def test_output_has_the_promised_shape(encoder, options):
    tower = tiny_tower(encoder, **options).eval()
    output = tower(tiny_pixels(tower), output_hidden_states=True)

    tokens = options.get("num_queries", 16)
    assert output.last_hidden_state.shape == (2, tokens, tower.config.hidden_size)
    assert tower.config.num_image_tokens == tokens
    assert output.pooler_output.shape == (2, tower.config.hidden_size)
    assert all(state.shape == output.last_hidden_state.shape for state in output.hidden_states)
    assert len(output.hidden_states) == tower.num_layers
    assert output.maps[f"stride{tower.config.patch_size}"].shape == (2, tower.config.encoder_dim, 4, 4)


def test_patches_lie_in_the_map_row_by_row():
    tower = tiny_tower("clip").eval()
    output = tower(tiny_pixels(tower))
    patch = output.last_hidden_state[:, 2 * 4 + 3]
    torch.testing.assert_close(output.maps["stride8"][:, :, 2, 3], patch)


@every_encoder
@pytest.mark.parametrize("options", [{}, RESAMPLER], ids=["patches", "queries"])
def test_saved_tower_comes_back_bit_equal(encoder, options, tmp_path):
    tower = tiny_tower(encoder, **options).eval()
    tower.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)

    assert isinstance(loaded, DeemVisionTower)
    assert not any(info.values())
    pixels = tiny_pixels(tower)
    assert torch.equal(tower(pixels).last_hidden_state, realigned(loaded).eval()(pixels).last_hidden_state)


@every_encoder
def test_tower_can_be_built_without_memory(encoder):
    with torch.device("meta"):
        tower = tiny_tower(encoder, **RESAMPLER)
    assert all(parameter.is_meta for parameter in tower.parameters())


@every_encoder
def test_checkpointing_recomputes_the_layers_and_keeps_the_gradient(encoder):
    tower = tiny_tower(encoder, **RESAMPLER).train()
    pixels = tiny_pixels(tower)
    calls = []
    layer_names = ("ConvNeXtBlock", "ResidualAttentionBlock", "ResamplerAttention")
    for module in tower.modules():
        # Of Hugging Face's layers a part: the call of the layer itself is outside of what is recomputed.
        if type(module).__name__ in layer_names or type(module).__name__.endswith("MLP"):
            module.register_forward_pre_hook(lambda module, *_: calls.append(module))

    def gradients():
        tower.zero_grad()
        calls.clear()
        tower(pixels).last_hidden_state.square().sum().backward()
        return {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}, len(calls)

    plain, plain_calls = gradients()
    tower.gradient_checkpointing_enable()
    checkpointed, checkpointed_calls = gradients()
    tower.gradient_checkpointing_disable()
    _, calls_after = gradients()

    heads = sum("head" in name and type(module).__name__.endswith("MLP") for name, module in tower.named_modules())
    assert checkpointed_calls - heads == 2 * (plain_calls - heads)
    assert calls_after == plain_calls
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_wrapped_clip_gives_what_clip_gives():
    tower = tiny_tower("clip").eval()
    stock = CLIPVisionModel(tower.config.encoder_config).eval()
    stock.load_state_dict(tower.encoder.model.state_dict())
    pixels = tiny_pixels(tower)

    ours = tower(pixels, output_hidden_states=True)
    theirs = stock(pixels, output_hidden_states=True)

    for layer in range(-4, 4):
        assert torch.equal(ours.hidden_states[layer], theirs.hidden_states[layer][:, 1:])
    assert torch.equal(ours.pooler_output, theirs.pooler_output)


def test_open_clip_vit_counts_layers_as_hugging_face_clip_does():
    """The weights of one, given to the other under its names, give the same layers."""
    ours = tiny_tower("open_clip_vit", open_clip_config=_clip_like()).eval()
    stock = CLIPVisionModel(encoder_options("clip")["encoder_config"]).eval()
    ours.encoder.trunk.load_state_dict(_to_open_clip(stock.state_dict()), strict=True)
    pixels = tiny_pixels(ours)

    a, b = ours(pixels, output_hidden_states=True), stock(pixels, output_hidden_states=True)

    for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
        torch.testing.assert_close(x, y[:, 1:])
    torch.testing.assert_close(a.pooler_output, b.pooler_output)


def _clip_like():
    return {
        "image_size": VIT["image_size"],
        "patch_size": VIT["patch_size"],
        "width": VIT["hidden_size"],
        "head_width": VIT["hidden_size"] // VIT["num_attention_heads"],
        "layers": VIT["num_hidden_layers"],
        "mlp_ratio": VIT["intermediate_size"] / VIT["hidden_size"],
        "quick_gelu": True,
    }


def _to_open_clip(state_dict):
    names = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.patch_embedding.": "conv1.",
        "pre_layrnorm.": "ln_pre.",
        "post_layernorm.": "ln_post.",
        "encoder.layers.": "transformer.resblocks.",
        "self_attn.out_proj.": "attn.out_proj.",
        "layer_norm": "ln_",
        "mlp.fc1.": "mlp.c_fc.",
        "mlp.fc2.": "mlp.c_proj.",
    }
    weights, packed = {}, {}
    for name, value in state_dict.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if "self_attn." in name:
            prefix, rest = name.split("self_attn.")
            part, kind = rest.split("_proj.")
            packed.setdefault(f"{prefix}attn.in_proj_{kind}", {})[part] = value
        else:
            weights[name] = value
    return weights | {name: torch.cat([parts[p] for p in "qkv"]) for name, parts in packed.items()}


def test_other_image_sizes_work_where_the_encoder_allows_them():
    for encoder in ("clip", "siglip", "siglip2", "dinov2"):
        tower = tiny_tower(encoder, image_size=48).eval()
        assert tower(tiny_pixels(tower)).last_hidden_state.shape == (2, 36, 32)


def test_siglip2_reads_patches_in_the_order_of_its_own_processor():
    from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

    tower = tiny_tower("siglip2")
    pixels = tiny_pixels(tower)
    inputs = tower.encoder.layout.pack(list(pixels))
    expected = torch.stack([convert_image_to_patches(image, 8) for image in pixels])
    assert torch.equal(inputs["pixel_values"], expected)


def test_unsupported_encoders_of_open_clip_are_refused():
    with pytest.raises(ValueError, match="ConvNeXts and plain vision transformers can be the encoder"):
        DeemVisionConfig(open_clip_config={"timm_model_name": "swin_base_patch4_window7_224"})
