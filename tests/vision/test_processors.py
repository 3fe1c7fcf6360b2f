"""The real processors write as many image tokens as the model, with the new tower, gives features for."""

import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    AyaVisionProcessor,
    CLIPImageProcessor,
    Cohere2VisionImageProcessor,
    Cohere2VisionProcessor,
    GotOcr2ImageProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
)

from deem_plugin.vision import assemble_llava, mount_tower
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.vision.test_hosts import make_host
from tests.vision.towers import RESAMPLER, tiny_tower

AYA_TOKENS = ["<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>"]


def host_processor(model_type):
    """The processor that each host has in its checkpoints, for images of 32 pixels and patches of 8."""
    square = {"height": 32, "width": 32}
    pinpoints = [[32, 64], [64, 32]]
    tokenizer = tiny_tokenizer()
    llava = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if model_type in ("llava", "vipllava"):
        return LlavaProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square), tokenizer, **llava)
    if model_type == "llava_next":
        images = LlavaNextImageProcessor(
            size={"shortest_edge": 32}, crop_size=square, image_grid_pinpoints=pinpoints, do_pad=True
        )
        return LlavaNextProcessor(images, tokenizer, **llava)
    if model_type == "llava_onevision":
        images = LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=pinpoints)
        return LlavaOnevisionProcessor(
            images,
            tokenizer,
            LlavaOnevisionVideoProcessor(size=square),
            num_image_tokens=16,
            vision_feature_select_strategy="full",
        )
    if model_type == "paligemma":
        images = SiglipImageProcessor(size=square)
        images.image_seq_length = 16
        return PaliGemmaProcessor(images, tokenizer)
    tokenizer.add_tokens(AYA_TOKENS, special_tokens=True)
    if model_type == "aya_vision":
        images = GotOcr2ImageProcessor(size=square, crop_to_patches=True, max_patches=2)
        return AyaVisionProcessor(images, tokenizer, patch_size=8, img_size=32, downsample_factor=2)
    names = {"boi_token": 0, "eoi_token": 1, "img_line_break_token": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"} | {name: AYA_TOKENS[i] for name, i in names.items()},
    )
    images = Cohere2VisionImageProcessor(size=square, patch_size=2, max_patches=2)
    return Cohere2VisionProcessor(images, tokenizer)


CASES = [
    ("llava", "convnext", {}),
    ("llava", "convnext", {"class_token": False}),
    ("llava", "convnext", RESAMPLER),
    ("llava", "clip", RESAMPLER | {"class_token": False}),
    ("vipllava", "siglip", {}),
    ("vipllava", "clip", RESAMPLER),
    ("llava_next", "convnext", {}),
    ("llava_next", "siglip", {"class_token": False}),
    ("llava_onevision", "convnext", {}),
    ("llava_onevision", "siglip", {"class_token": False}),
    ("paligemma", "convnext", {}),
    ("paligemma", "clip", RESAMPLER),
    ("aya_vision", "convnext", {}),
    ("aya_vision", "siglip", {"class_token": False}),
    ("cohere2_vision", "convnext", {"class_token": False}),
]


@pytest.mark.parametrize(("model_type", "encoder", "options"), CASES)
def test_processor_and_model_agree_on_the_number_of_image_tokens(model_type, encoder, options, tmp_path):
    tower = tiny_tower(encoder, **options, image_mean=[0.1, 0.2, 0.3])
    before = host_processor(model_type)
    settings = before.to_dict()
    model, processor = mount_tower(make_host(model_type), tower, before)
    assert before.to_dict() == settings
    if model_type == "aya_vision":
        model.config.image_token_id = model.config.image_token_index = processor.image_token_id
    model.resize_token_embeddings(len(processor.tokenizer))

    processor.save_pretrained(tmp_path)
    for fitted in (processor, AutoProcessor.from_pretrained(tmp_path)):
        inputs = fitted(images=[[Image.new("RGB", (100, 60), "red")]], text=["<image>what?"], return_tensors="pt")
        assert tuple(fitted.image_processor.image_mean) == (0.1, 0.2, 0.3)
        assert inputs["pixel_values"].shape[-1] == tower.config.image_size
        with torch.no_grad():
            model.eval()(**{name: value for name, value in inputs.items() if name != "labels"})


@pytest.mark.parametrize("options", [{}, RESAMPLER, {"class_token": False}], ids=["patches", "queries", "no class"])
def test_llava_of_parts_gets_a_processor_that_agrees(options, tmp_path):
    tower = tiny_tower("convnext", **options)
    model, processor = assemble_llava(tiny_llama(tmp_path), tiny_tokenizer(), tower)
    images = [Image.new("RGB", (100, 60), "red"), Image.new("RGB", (60, 100), "blue")]
    inputs = processor(images=images, text=["<image>what?", "<image>what?"], return_tensors="pt")
    expected = options.get("num_queries", 16)
    assert (inputs["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [expected, expected]
    assert model.eval().generate(**inputs, max_new_tokens=1).shape[0] == 2
