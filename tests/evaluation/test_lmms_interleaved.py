"""The interleaved model in lmms-eval: found by the Auto classes, answering as it does by itself."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deem_plugin.evaluation.chats import read_messages
from deem_plugin.evaluation.drawing import split_wish
from deem_plugin.evaluation.lmms import DeemChat, DeemSimple
from deem_plugin.models import generate_images

from ..feedback.tiny_diffusion_models import save_diffusion_model
from ..models.tiny_deem import tiny_deem
from ..tiny import tiny_image, tiny_llava
from .helpers import request
from .test_lmms import GREEDY, chat, chat_requests, to_messages


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deem")
    model, processor = tiny_deem()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_a_batch_answers_what_each_prompt_alone_does(checkpoint, docs):
    model = chat(checkpoint, docs, batch_size=3)

    together = model.generate_until(chat_requests(docs))

    assert type(model.vlm.model).__name__ == "DeemForConditionalGeneration"
    alone = chat(checkpoint, docs, batch_size=1)
    assert together == alone.generate_until(chat_requests(docs))
    assert len(set(together)) > 1


@pytest.fixture(scope="module")
def diffusion_model(tmp_path_factory):
    return str(save_diffusion_model(tmp_path_factory.mktemp("diffusion_model"), "sd1"))


def region_messages(doc):
    """One message with a region, in the form of the tasks `deem_refcoco*`."""
    parts = [{"type": "image", "url": doc["image"], "region": (2, 3, 22, 33)}, {"type": "text", "text": "\nWhat?\n"}]
    return [{"role": "user", "content": parts}]


def test_it_is_asked_about_the_region_itself(checkpoint):
    """Next to a question about a whole picture, in one call; the answer is that of the model by itself."""
    image = tiny_image(5, (80, 64))
    model = DeemChat(pretrained=checkpoint, device="cpu", batch_size=2)
    model.task_dict = {"task": {"test": [{"image": image, "images": [image], "question": "What?"}]}}
    requests = [request("", messages, dict(GREEDY), 0, "task", "test") for messages in (region_messages, to_messages)]

    about, whole = model.generate_until(requests)

    inputs = model.vlm.processor(
        text="<image>\nWhat?\n", images=[image], regions=[(2, 3, 22, 33)], return_tensors="pt"
    )
    output = model.vlm.model.generate(**inputs, do_sample=False, max_new_tokens=6)
    answer = model.vlm.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert about == answer.split("\n\n")[0]
    assert whole == model.generate_until(requests[1:])[0]


def test_a_model_without_regions_is_told_of_the_task_that_draws_them(tmp_path):
    tiny_llava(tmp_path)
    model = DeemChat(pretrained=str(tmp_path), device="cpu")
    model.task_dict = {"deem_refcoco_val": {"test": [{"image": tiny_image(5)}]}}

    with pytest.raises(ValueError, match="deem_refcoco_val asks about regions, which LlavaProcessor does not read"):
        model.generate_until([request("", region_messages, dict(GREEDY), 0, "deem_refcoco_val", "test")])


def test_it_answers_by_pictures_of_the_prompts_in_a_batch_or_alone(checkpoint, diffusion_model, tmp_path, docs):
    options = {"diffusion_model": diffusion_model, "steps": 2, "guidance": 2.0}
    model = chat(checkpoint, docs, batch_size=3, image_dir=str(tmp_path / "one"), **options)

    answers = [json.loads(answer) for answer in model.generate_until(chat_requests(docs))]

    assert [answer["text"] for answer in answers] == [""] * len(docs)
    paths = [Path(path) for answer in answers for path in answer["images"]]
    assert paths == [tmp_path / "one" / "task" / f"{index:06d}.png" for index in range(len(docs))]
    # By the definition: what generate_images draws of the document, with the document's number as its seed.
    inputs = model.vlm.processor(
        text=f"<image>{docs[3]['question']}<image_start>", images=docs[3]["images"], return_tensors="pt"
    )
    [picture] = generate_images(model.vlm.model, inputs, [3], steps=2, guidance=2.0)
    difference = np.asarray(picture, int) - np.asarray(Image.open(paths[3]), int)
    assert abs(difference).max() <= 1  # batched sums differ in their last bits
    assert len({path.read_bytes() for path in paths}) == len(docs)


def test_it_draws_first_and_then_answers_with_the_drawing_before_it(checkpoint, diffusion_model, docs):
    text = "[GEN_PROMPT]mark it[/GEN_PROMPT][QUESTION]What is it?[/QUESTION]"
    asked = [{"images": doc["images"], "question": text} for doc in docs]
    model = DeemSimple(
        pretrained=checkpoint,
        device="cpu",
        batch_size=2,
        diffusion_model=diffusion_model,
        steps=2,
        guidance=1.0,
    )
    model.task_dict = {"task": {"test": asked}}
    requests = [
        request(text, dict(GREEDY) | {"visual_cot": True}, lambda doc: doc["images"], index, "task", "test")
        for index in range(len(asked))
    ]

    answers = model.generate_visual_cot(requests)

    wishes = [
        split_wish(read_messages(model._messages(each), "task", index))[0] for index, each in enumerate(requests)
    ]
    drawn = model.vlm.draw(wishes[:2], steps=2, guidance=1.0)
    model.task_dict = {
        "task": {
            "test": [
                {"images": [*doc["images"], picture], "question": "What is it?"}
                for doc, picture in zip(asked, drawn, strict=False)
            ]
        }
    }
    alone = [request("What is it?", *each.args[1:]) for each in requests[:2]]
    assert answers[:2] == model.generate_until(alone)
    assert len(answers) == len(docs)


def test_drawing_needs_a_model_that_draws_and_something_to_draw_with(checkpoint, diffusion_model, tmp_path):
    with pytest.raises(ValueError, match="takes the interleaved model and what it draws with: .*diffusion_model="):
        DeemSimple(pretrained=checkpoint, device="cpu").generate_visual_cot([])
    tiny_llava(tmp_path)
    with pytest.raises(ValueError, match="for the interleaved model, which draws; this is a LlavaForConditional"):
        DeemChat(pretrained=str(tmp_path), device="cpu", diffusion_model=diffusion_model)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": "many"}, {"guidance": "strong"}])
def test_wrong_settings_of_drawing_are_refused(checkpoint, wrong):
    with pytest.raises(
        ValueError, match="steps is .* and guidance is .*; give a whole number from 1 up, and a number"
    ):
        DeemChat(pretrained=checkpoint, **wrong)


@pytest.mark.parametrize("beams", [1, 2])
def test_questions_about_a_picture_share_it_with_the_maps_beside_the_cache(checkpoint, tmp_path, beams):
    model, processor = tiny_deem()
    for name, parameter in model.named_parameters():
        if "gate" in name:  # closed at first, and then no map is seen
            torch.nn.init.constant_(parameter, 0.5)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    docs = [
        {"images": [tiny_image(seed, (80, 64)) for seed in seeds], "question": f"What {'is ' * number}it?"}
        for number, seeds in enumerate([[0], [1, 2], [0], [0], [1, 2]])
    ]

    alone, together = chat(str(tmp_path), docs, batch_size=1), chat(str(tmp_path), docs, batch_size=4)
    alone.vlm.shared_prefix.shares = False

    requests = chat_requests(docs, num_beams=beams)
    assert together.generate_until(requests) == alone.generate_until(requests)
    assert together.vlm.shared_prefix.shares
