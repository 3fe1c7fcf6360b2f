"""The encoder by itself: MMVP-VLM and zero-shot scores equal those computed by hand, picture by picture."""

import csv
import json

import pytest
import torch
from open_clip import SIMPLE_IMAGENET_TEMPLATES
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, SiglipConfig, SiglipModel

from deem_plugin.cli import main
from deem_plugin.evaluation.clip import load_clip
from deem_plugin.evaluation.encoder import (
    PATTERNS,
    EncoderData,
    evaluate_encoder,
    pairs_right,
    score_mmvp_vlm,
    score_zero_shot,
)
from deem_plugin.evaluation.questions import QuestionDataError

from ..tiny import IMAGE_SIZE, PATCH_SIZE, tiny_image, tiny_image_processor, tiny_tokenizer
from .mining_clip import save_mining_clip

FOLDERS = [pattern.title() for pattern in PATTERNS]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    save_mining_clip(folder)
    return folder


@pytest.fixture(scope="module")
def mmvp_vlm(tmp_path_factory):
    """MMVP-VLM as published: 270 pictures and statements, two successive ones being a pair."""
    folder = tmp_path_factory.mktemp("mmvp_vlm")
    rows = [["Question ID", "Type", "Statement"]]
    for number in range(1, 271):
        pattern = FOLDERS[(number - 1) // 30]
        (folder / "MLLM_VLM Images" / pattern).mkdir(parents=True, exist_ok=True)
        tiny_image(number, (12, 10)).save(folder / "MLLM_VLM Images" / pattern / f"{number}.jpg")
        rows.append([number, pattern, f"thing {number * 7919 % 1000}"])
    with (folder / "Questions.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def logits(model, folder, paths, texts):
    """The model's own logits, (texts, images)."""
    images = AutoImageProcessor.from_pretrained(folder)([Image.open(path).convert("RGB") for path in paths])
    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding="max_length", max_length=48, return_tensors="pt")
    pixels = torch.stack([torch.as_tensor(image) for image in images["pixel_values"]])
    with torch.no_grad():
        return model(tokens["input_ids"], pixels, tokens["attention_mask"]).logits_per_text


def test_mmvp_vlm_scores_equal_the_protocol_followed_pair_by_pair(clip_folder, mmvp_vlm):
    model = save_mining_clip(clip_folder)
    with (mmvp_vlm / "Questions.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    right = []
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        paths = [mmvp_vlm / "MLLM_VLM Images" / pattern / f"{number}.jpg" for number, pattern, _ in (first, second)]
        choices = logits(model, clip_folder, paths, [f"a photo of {row[2]}" for row in (first, second)]).softmax(-1)
        right.append(bool(choices[0, 0] > 0.5) and not bool(choices[1, 0] > 0.5))

    scores = score_mmvp_vlm(load_clip(str(clip_folder), device="cpu"), mmvp_vlm, batch_size=50)

    assert scores["right"] == right
    assert 0 < sum(right) < 135
    assert scores["mean"] == pytest.approx(sum(right) / 135)
    assert list(scores["patterns"].values()) == [sum(right[15 * k : 15 * k + 15]) / 15 for k in range(9)]
    assert scores["low"] < scores["mean"] < scores["high"]


def test_a_pair_is_right_only_when_both_texts_choose_theirs_and_a_tie_is_the_second_picture():
    one, other, between = torch.eye(2)[0], torch.eye(2)[1], torch.tensor([0.5, 0.5]).sqrt()
    images = torch.stack([torch.stack([one, other])] * 4)
    texts = torch.stack([torch.stack(pair) for pair in [(one, other), (one, one), (other, one), (one, between)]])

    assert pairs_right(images, texts, 100.0, [1, 2] * 4) == [True, False, False, True]
    # The number, not the place, says which picture a text describes.
    assert pairs_right(images[:1], texts[2:3], 100.0, [2, 1]) == [True]


def test_zero_shot_equals_the_model_picture_by_picture_for_folders_called_by_name_and_by_wnid(clip_folder, tmp_path):
    model, clip = save_mining_clip(clip_folder), load_clip(str(clip_folder), device="cpu")
    layouts = {
        "named": {"fire_engine": "fire engine", "owl": "owl", "sea-lion": "sea lion"},
        "wnids": {"n01440764": "tench", "n01443537": "goldfish", "n02012849": "crane bird"},
    }
    for layout, classes in layouts.items():
        right, paths = [], {}
        for place, folder in enumerate(classes):
            (tmp_path / layout / folder).mkdir(parents=True)
            for index in range(3):
                paths[f"{folder}/{index}.png"] = place
                tiny_image(10 * place + index).save(tmp_path / layout / folder / f"{index}.png")
        texts = [[template(name) for template in SIMPLE_IMAGENET_TEMPLATES] for name in classes.values()]
        lengths = [clip.text_features(group).sum(0).norm() for group in texts]
        for path, place in paths.items():
            # The mean of unit features, then its direction; the length of a picture's feature changes nothing.
            sums = [logits(model, clip_folder, [tmp_path / layout / path], group).sum() for group in texts]
            scores = torch.stack([total / length for total, length in zip(sums, lengths, strict=True)])
            right.append(int(scores.argmax()) == place)

        result = score_zero_shot(clip, tmp_path / layout, batch_size=4)

        assert result["right"] == dict(zip(paths, right, strict=True))
        assert (result["classes"], result["pictures"]) == (3, 9)
        assert result["accuracy"] == pytest.approx(sum(right) / 9) == result["mean_per_class"]


def test_siglip_features_give_the_logits_of_the_model_but_for_its_bias(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = tiny_tokenizer()
    text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 48, "projection_size": 32}
    vision = {**sizes, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    for part in (model, tokenizer, tiny_image_processor()):
        part.save_pretrained(tmp_path)
    tiny_image(0).save(tmp_path / "picture.png")
    texts = ["a photo of a cat", "a photo of two dogs"]
    tokens = tokenizer(texts, padding="max_length", max_length=48, return_tensors="pt")["input_ids"]
    pixels = tiny_image_processor()(tiny_image(0), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(tokens, pixels).logits_per_text - model.logit_bias

    clip = load_clip(str(tmp_path), device="cpu")

    found = clip.logit_scale * clip.text_features(texts) @ clip.image_features([tiny_image(0)]).T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_command_prints_the_scores_and_writes_them(clip_folder, mmvp_vlm, tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        tiny_image(len(name)).save(tmp_path / "set" / name / "1.png")
    command = ["eval-encoder", str(clip_folder), "--mmvp-vlm", str(mmvp_vlm), "--zero-shot", str(tmp_path / "set")]

    assert main([*command, "--out", str(tmp_path / "out" / "scores.json")]) == 0

    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert all(pattern in printed for pattern in PATTERNS)
    assert f"{100 * result['mmvp_vlm']['mean']:.1f}  [" in printed
    assert len(result["weights"]) == 64 and result["zero_shot"]["pictures"] == 2


def test_bad_data_is_named(clip_folder, mmvp_vlm, tmp_path):
    clip = load_clip(str(clip_folder), device="cpu")
    with pytest.raises(ValueError, match="Nothing to evaluate on"):
        evaluate_encoder(str(clip_folder), EncoderData())
    with pytest.raises(QuestionDataError, match="Questions.csv is no question file of MMVP-VLM"):
        score_mmvp_vlm(clip, tmp_path)
    lines = (mmvp_vlm / "Questions.csv").read_text().splitlines()
    (tmp_path / "Questions.csv").write_text("\n".join(lines))
    with pytest.raises(QuestionDataError, match=r"270 of 270 pictures are missing \(the first: .*1.jpg\)"):
        score_mmvp_vlm(clip, tmp_path)
    (tmp_path / "Questions.csv").write_text("\n".join(lines[:-1]))
    with pytest.raises(QuestionDataError, match="has 269 questions; MMVP-VLM has 270"):
        score_mmvp_vlm(clip, tmp_path)

    with pytest.raises(QuestionDataError, match="No such folder: .*gone"):
        score_zero_shot(clip, tmp_path / "gone")
    (tmp_path / "set" / "cat").mkdir(parents=True)
    (tmp_path / "set" / "cat" / "1.png").write_bytes(b"no picture")
    with pytest.raises(QuestionDataError, match="has 1 subfolders with pictures; .*at least two classes"):
        score_zero_shot(clip, tmp_path / "set")
    (tmp_path / "set" / "dog").mkdir()
    tiny_image(0).save(tmp_path / "set" / "dog" / "1.png")
    with pytest.raises(QuestionDataError, match="Cannot read the picture .*cat/1.png"):
        score_zero_shot(clip, tmp_path / "set")
    (tmp_path / "set" / "n99999999").mkdir()
    with pytest.raises(QuestionDataError, match="called by wnid .n99999999. beside others, or by wnids that are no"):
        score_zero_shot(clip, tmp_path / "set")
