"""What the eyes measure of a model is what the model does."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    AyaVisionProcessor,
    CLIPVisionModel,
    Llama4Processor,
    LlavaForConditionalGeneration,
)

from deem_plugin.vision.eyes import Eyes
from deem_plugin.vision.towers import find_tower

from ..families.builders import build, picture
from ..tiny import tiny_clip_config, tiny_llava, tiny_tokenizer

STATISTICS = {"mean": [0.5] * 3, "std": [0.5] * 3}


def llava_reading(layer, strategy):
    model, processor = tiny_llava()
    model.config.vision_feature_layer = layer
    model.config.vision_feature_select_strategy = strategy
    if not isinstance(layer, int):
        width = model.config.vision_config.hidden_size * len(layer)
        projector = model.model.multi_modal_projector
        projector.linear_1 = torch.nn.Linear(width, projector.linear_1.out_features)
    return model, Eyes.of(model, processor)


@pytest.mark.parametrize(
    ("layer", "strategy", "expected"),
    [
        (-2, "default", lambda out: out.hidden_states[-2][:, 1:]),
        (-2, "full", lambda out: out.hidden_states[-2]),
        ([-2, -1], "full", lambda out: torch.cat([out.hidden_states[-2], out.hidden_states[-1]], -1)),
    ],
)
def test_the_tokens_are_those_that_llava_reads(layer, strategy, expected):
    model, eyes = llava_reading(layer, strategy)
    pixel_values = torch.randn(2, 3, 32, 32)

    output = model.model.vision_tower(pixel_values, output_hidden_states=True)
    views = eyes.views({"pixel_values": pixel_values}, output)

    assert torch.equal(torch.stack([view.tokens for view in views]), expected(output))
    assert eyes.width == views[0].tokens.shape[-1]


def hooks_of(model):
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def test_measuring_changes_nothing():
    model, processor = tiny_llava()
    model.get_image_features(pixel_values=torch.zeros(1, 3, 32, 32))  # transformers puts hooks of its own on, once
    model.train()
    model.model.vision_tower.eval()
    state = torch.random.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    hooks = hooks_of(model)

    Eyes.of(model, processor)

    assert torch.equal(torch.random.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert hooks_of(model) == hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_parameters_behind_the_layer_that_is_read_are_not_read():
    model, processor = tiny_llava()

    read = Eyes.of(model, processor).read_parameters

    last = len(find_tower(model).vision_model.encoder.layers) - 1 if hasattr(find_tower(model), "vision_model") else 2
    assert read and not any(f"layers.{last}." in name or "post_layernorm" in name for name in read)


def test_the_tower_within_modules_to_save_is_found():
    model, processor = tiny_llava()
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["vision_tower"])
    wrapped = get_peft_model(model, config)

    eyes = Eyes.of(wrapped, processor)

    assert isinstance(eyes.tower, CLIPVisionModel) or type(eyes.tower).__name__.startswith("CLIP")
    assert all(parameter.requires_grad for parameter in eyes.tower.parameters())


def test_an_encoder_alone_is_its_own_tower():
    encoder = CLIPVisionModel(tiny_clip_config())

    eyes = Eyes.of(encoder, None, **STATISTICS)
    views = eyes.look([torch.rand(3, 32, 32), torch.rand(3, 32, 32)])

    assert eyes.tower is encoder and [view.tokens.shape for view in views] == [(17, 32)] * 2
    assert eyes.pooled_width == 32 and views[0].pooled.shape == (32,)


def test_text_models_and_unknown_statistics_are_refused():
    from transformers import LlamaConfig

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="Found no vision tower in LlamaModel"):
        Eyes.of(AutoModel.from_config(LlamaConfig(vocab_size=32, **sizes)), None, **STATISTICS)
    model, processor = tiny_llava()
    with pytest.raises(ValueError, match="processing_class=.*image_mean.*processing_class=processor"):
        Eyes.of(model, processor.tokenizer)


def test_the_image_processor_is_found_where_the_model_came_from(tmp_path):
    """Trainers of other frameworks hand on the tokenizer alone."""
    model, processor = tiny_llava()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path)

    assert Eyes.of(model, processor.tokenizer).mean == processor.image_processor.image_mean


def test_a_layout_whose_pictures_come_back_scrambled_is_refused():
    """Patches in an order that is not known make a picture that nobody was shown, and no error by themselves."""
    case = build("qwen2_vl")

    class Reordered:
        image_mean, image_std = case.image_processor.image_mean, case.image_processor.image_std

        def __call__(self, **options):
            made = case.image_processor(**options)
            return {**made, "pixel_values": made["pixel_values"].flip(0)}

    assert Eyes.of(case.model, case.image_processor)
    with pytest.raises(
        ValueError, match="cannot be put together.*laid out in an order that the feedback does not know"
    ):
        Eyes.of(case.model, Reordered())


def with_tokens(tokenizer, *tokens):
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    return tokenizer


def aya():
    """Aya Vision with its processor, whose tiles have their names between them; 4 tokens a tile."""
    case = build("aya_vision")
    tokenizer = with_tokens(tiny_tokenizer(), "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "TILE_GLOBAL")
    options = {"patch_size": 8, "img_size": 32, "downsample_factor": 2, "image_token": "<image>"}
    processor = AyaVisionProcessor(case.image_processor, tokenizer, **options)
    case.model.config.image_token_index = processor.image_token_id
    return case.model, processor


def llama4():
    """Llama 4 with its processor, whose tiles have separators between them."""
    case = build("llama4")
    names = ("start", "end", "tile_x_separator", "tile_y_separator")
    marks = [f"<|image_{name}|>" if name in ("start", "end") else f"<|{name}|>" for name in names]
    tokenizer = with_tokens(tiny_tokenizer(), *marks, "<|patch|>", "<|image|>")
    processor = Llama4Processor(case.image_processor, tokenizer, patch_size=8)
    case.model.config.image_token_index = tokenizer.convert_tokens_to_ids("<|patch|>")
    return case.model, processor


@pytest.mark.parametrize(("make", "mark"), [(aya, "<image>"), (llama4, "<|image|>")])
def test_tiles_with_tokens_between_them_are_one_image(make, mark):
    """Two images next to each other and one in a text of its own: of two, of four tiles, and of one."""
    model, processor = make()
    eyes = Eyes.of(model, processor)
    images = [picture(*size, seed)[0] for seed, size in enumerate(((64, 32), (64, 64), (32, 32)))]
    batch = processor(
        text=[f"{mark}{mark}what", f"a {mark}"], images=[images[:2], images[2:]], padding=True, return_tensors="pt"
    )

    views = eyes.show(model, dict(batch))

    assert [view.image for view in views] == [0] * 3 + [1] * 5 + [2]
    kinds = ["tile", "tile", "thumbnail"], ["tile"] * 4 + ["thumbnail"], ["image"]
    assert [view.kind for view in views] == [kind for own in kinds for kind in own]
