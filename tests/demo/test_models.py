"""The demo's starting model: what it reads of a prompt, and that it saves and learns."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from deem_plugin.data.chat import render_chat
from deem_plugin.demo.models import IMAGE_SIZE, build_tokenizer, build_tower, pretrain_tower, save_start
from deem_plugin.demo.scenes import captions, detail_questions, sample_scenes
from deem_plugin.demo.sets import POPE_SUFFIX, pope_question, training_scenes
from deem_plugin.evaluation.robustvqa import PROMPT


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (PROMPT.format(caption="square"), "is square"),
        (pope_question(6, 3) + POPE_SUFFIX, "is there an orange star"),
        ("Is the object on the left?", "is the object on the left"),
        ("Is the background plain?", "is the background plain"),
        ("a red square", "a red square"),
    ],
)
def test_tokenizer_reads_the_question_and_skips_the_instructions(tokenizer, prompt, words):
    assert tokenizer.tokenize(prompt) == words.split()


def test_no_word_of_captions_and_questions_is_unknown(tokenizer):
    scenes = sample_scenes(100, torch.Generator().manual_seed(0))
    texts = captions(scenes) + [text for pairs in detail_questions(scenes) for pair in pairs for text in pair]
    assert tokenizer.unk_token_id not in {token for ids in tokenizer(texts)["input_ids"] for token in ids}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    scenes, pictures = training_scenes(48, seed=0)
    return save_start(tmp_path_factory.mktemp("start"), scenes, pictures, seed=0, steps=1)


def test_start_loads_by_the_auto_classes_and_answers_about_a_picture(start):
    model = AutoModelForImageTextToText.from_pretrained(start)
    processor = AutoProcessor.from_pretrained(start)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is the object big?"}]}
    text = render_chat(processor, [message], add_generation_prompt=True)
    picture = torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    inputs = processor(text=text, images=[picture], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 8
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 2


def test_same_seed_makes_the_same_start(start, tmp_path):
    scenes, pictures = training_scenes(48, seed=0)
    again = save_start(tmp_path, scenes, pictures, seed=0, steps=1)
    assert (start / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_contrast_teaches_the_encoder_and_leaves_the_resampler_alone():
    tower = build_tower()
    before = {name: value.clone() for name, value in tower.named_parameters()}
    scenes, pictures = training_scenes(200, seed=1)
    _, first = pretrain_tower(tower, pictures, scenes, seed=0, steps=1)
    _, last = pretrain_tower(tower, pictures, scenes, seed=0, steps=25)
    assert last < 0.7 * first
    moved = {name for name, value in tower.named_parameters() if not torch.equal(value, before[name])}
    assert any(name.startswith("encoder.trunk.stages.0") for name in moved)
    assert not any(name.startswith("resampler") for name in moved)
