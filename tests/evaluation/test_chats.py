"""What a request asks: messages and pictures as they are, and regions instead of lines drawn on a picture."""

import numpy as np
import pytest
from PIL import Image

from deem_plugin.data.region_sources import DESCRIBE_QUESTION
from deem_plugin.data.tokens import tokenize
from deem_plugin.evaluation import refcoco, robustvqa
from deem_plugin.evaluation.chats import read_messages
from deem_plugin.evaluation.drawing import split_wish, with_drawing
from deem_plugin.vision.regions import region_mask

from ..models.tiny_deem import tiny_deem
from ..tiny import tiny_image, tiny_processor


def tiny_deem_processor():
    return tiny_deem()[1]


def question(text, images=()):
    return [
        {"role": "user", "content": [*({"type": "image", "url": i} for i in images), {"type": "text", "text": text}]}
    ]


@pytest.mark.parametrize("outline", [None, [20, 10, 30, 10, 30, 20, 20, 20]])
def test_the_region_of_a_document_is_meant_and_nothing_is_drawn_on_its_picture(outline):
    image = tiny_image(0, (40, 30))
    doc = {"image": image, "bbox": [4.0, 6.0, 10.0, 8.0], "segmentation": outline, "question_id": "1"}

    chat = read_messages(refcoco.doc_to_messages(doc), "deem_refcoco_val", 3)

    assert chat.about_regions
    assert chat.render(tiny_deem_processor()) == f"<image>{DESCRIBE_QUESTION}"  # as stage 3 learns it
    assert np.array_equal(np.asarray(chat.images[0]), np.asarray(image))
    expected = np.zeros((30, 40), bool)
    if outline is None:
        expected[6:14, 4:14] = True
    else:
        expected[10:20, 20:30] = True
    assert np.array_equal(region_mask(chat.regions[0], *image.size), expected)


@pytest.mark.parametrize("make", [tiny_processor, tiny_deem_processor])
@pytest.mark.parametrize("text", ["USER: <image>\nWhat?", "What does <image_start> mean?", "a <video> of it"])
def test_marks_in_a_question_are_text(make, text):
    """Tasks write them by themselves, or a text holds them by chance: the picture's own mark is the only one."""
    processor = make()
    chat = read_messages(question(text, [tiny_image(0)]), "task", 0)

    inputs, _ = tokenize(processor, [chat.render(processor)], [chat.images])

    special = [token for token in processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0]) if "<" in token]
    empty = read_messages(question("", chat.images), "task", 0)
    plain, _ = tokenize(processor, [empty.render(processor)], [chat.images])
    expected = [token for token in processor.tokenizer.convert_ids_to_tokens(plain["input_ids"][0]) if "<" in token]
    assert [token for token in special if token != "<"] == expected
    assert text.split()[-1] in processor.tokenizer.decode(inputs["input_ids"][0]).replace("< ", "<")


@pytest.mark.parametrize("mode", ["RGBA", "I;16"])
def test_pictures_are_read_as_in_training(mode):
    """What is transparent is laid on white, and 16 bits of grey stay grey."""
    if mode == "RGBA":
        image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    else:
        image = Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8))

    [read] = read_messages(question("What?", [image]), "task", 0).images

    values = np.asarray(read)
    assert read.mode == "RGB"
    assert (values == 255).all() if mode == "RGBA" else len(np.unique(values)) > 32


def test_an_answer_that_the_task_begins_is_gone_on_with():
    doc = {"image": tiny_image(0), "caption": "tabby"}
    chat = read_messages(robustvqa.paper_messages(doc), "robustvqa_paper_a", 0)

    prompt = chat.render(tiny_processor())

    assert prompt == (
        "<s><|im_start|>user\nBased on the image, please answer the question. <image>\n"
        "Is tabby the main object in this image? Please anwser yes or no<|im_end|>\n"
        "<|im_start|>assistant\nThe answer is"
    )


@pytest.mark.parametrize("begun", ["The answer is ", "\nAn <image> is", "It is</s>"])
def test_what_the_task_begins_is_found_as_the_template_writes_it(begun):
    messages = [*question("What?"), {"role": "assistant", "content": [{"type": "text", "text": begun}]}]
    processor = tiny_processor()
    processor.chat_template = processor.chat_template.replace("part['text']", "part['text'] | trim")

    prompt = read_messages(messages, "task", 0).render(processor)

    assert prompt.endswith(f"assistant\n{begun.strip().replace('<image', '< image')}")


def test_a_document_to_draw_has_no_template():
    chat = read_messages([{"role": "system", "content": "Draw."}, *question("a red cat", [tiny_image(0)])], "task", 0)

    assert chat.as_document(tiny_deem_processor()) == "Draw.\n<image>a red cat"


def test_a_wish_and_a_question_are_told_apart_and_the_drawing_comes_last():
    own, drawn = tiny_image(0), tiny_image(1)
    text = "[GEN_PROMPT] Mark it.[/GEN_PROMPT][QUESTION]How many\nare there?[/QUESTION]"

    wish, asked = split_wish(read_messages(question(text, [own]), "task", 7))
    both = with_drawing(asked, drawn)

    assert (wish.question, asked.question, wish.doc_id) == ("Mark it.", "How many\nare there?", 7)
    assert both.question == asked.question and both.images[1] is drawn and both.regions == [None, None]
    assert [part["type"] for part in both.messages[0]["content"]] == ["image", "image", "text"]
    plain = split_wish(read_messages(question("What is it?"), "task", 0))
    assert [part.question for part in plain] == ["What is it?"] * 2
