"""CLIP as two functions: what they give is what the model gives, from either library, and bad names say what to do."""

import json

import open_clip
import pytest
import torch
from transformers import AutoImageProcessor, AutoTokenizer

from deem_plugin.evaluation.clip import load_clip

from ..tiny import tiny_image, tiny_llava
from .mining_clip import save_mining_clip

TEXTS = ["A photo of a tench", "A photo of a crane bird", "A photo of a hen"]


def test_features_give_the_logits_of_the_hugging_face_model(tmp_path):
    model = save_mining_clip(tmp_path)
    images = [tiny_image(0, (40, 50)), tiny_image(1)]
    tokens = AutoTokenizer.from_pretrained(tmp_path)(TEXTS, padding="max_length", max_length=48, return_tensors="pt")
    pixel_values = AutoImageProcessor.from_pretrained(tmp_path)(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(tokens["input_ids"], pixel_values, tokens["attention_mask"]).logits_per_image

    clip = load_clip(str(tmp_path), device="cpu")
    logits = clip.logit_scale * clip.image_features(images) @ clip.text_features(TEXTS, batch_size=2).T

    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    raw = clip.text_features(TEXTS, normalize=False)
    torch.testing.assert_close(raw / raw.norm(dim=-1, keepdim=True), clip.text_features(TEXTS))


def test_features_of_an_open_clip_folder_are_those_of_its_model(tmp_path):
    torch.manual_seed(0)
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    model = open_clip.CLIP(**config).eval()
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    image = tiny_image(0)
    pixels = (torch.tensor(list(image.tobytes())).view(32, 32, 3).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5

    clip = load_clip(str(tmp_path), device="cpu")

    with torch.no_grad():
        torch.testing.assert_close(clip.image_features([image]), model.encode_image(pixels, normalize=True))
        tokens = open_clip.SimpleTokenizer(context_length=32)(TEXTS)
        torch.testing.assert_close(clip.text_features(TEXTS), model.encode_text(tokens, normalize=True))
    assert clip.logit_scale == pytest.approx(1 / 0.07)


def test_the_weights_hash_follows_the_weights(tmp_path):
    save_mining_clip(tmp_path / "one")
    save_mining_clip(tmp_path / "same")
    save_mining_clip(tmp_path / "other", seed=1)
    hashes = [load_clip(str(tmp_path / name), device="cpu").weights_hash() for name in ("one", "same", "other")]
    assert hashes[0] == hashes[1] != hashes[2]


def test_models_that_cannot_be_used_say_what_to_give(tmp_path):
    tiny_llava(tmp_path / "llava")
    with pytest.raises(ValueError, match=r"ViT-B-32 needs `--pretrained`.*tags \(openai"):
        load_clip("ViT-B-32")
    with pytest.raises(ValueError, match="`--pretrained` goes with a model name of open_clip"):
        load_clip(str(tmp_path), pretrained="openai")
    with pytest.raises(ValueError, match="Found no whole CLIP at .*Give a folder or hub id"):
        load_clip(str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="of type 'llava'; expected a whole CLIP"):
        load_clip(str(tmp_path / "llava"))
