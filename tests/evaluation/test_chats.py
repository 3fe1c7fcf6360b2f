"""What a request asks: messages and pictures as they are, and regions instead of lines drawn on a picture."""

import numpy as np
import pytest

from deem_plugin.evaluation.chats import about_region, asks_for_a_region, read_messages
from deem_plugin.evaluation.drawing import drawing_prompt, split_wish, with_drawing

from ..tiny import tiny_image


def question(text, images=()):
    return [
        {"role": "user", "content": [*({"type": "image", "url": i} for i in images), {"type": "text", "text": text}]}
    ]


def test_tasks_about_a_region_are_known_and_those_that_ask_for_one_are_not():
    known = (
        "refcoco_bbox_val",
        "refcoco_bbox_val_lite",
        "refcoco+_seg_testA",
        "refcocog_bbox_test",
        "refcoco_seg_test",
    )
    others = ("refcoco_bbox_rec_val", "refcoco+_bbox_rec_testB", "refcocog_bbox_rec_test", "pope", "refcoco_grounding")

    assert all(map(asks_for_a_region, known))
    assert not any(map(asks_for_a_region, others))


@pytest.mark.parametrize("task", ["refcoco_bbox_val", "refcocog_seg_test"])
def test_the_region_of_a_document_is_meant_and_nothing_is_drawn_on_its_picture(task):
    image = tiny_image(0, (40, 30))
    doc = {"image": image, "bbox": [4.0, 6.0, 10.0, 8.0], "segmentation": [20, 10, 30, 10, 30, 20, 20, 20]}
    drawn_on = tiny_image(1, (40, 30))

    chat = about_region(read_messages(question("What is it?", [drawn_on]), task, 3), doc)

    assert chat.render(processor=None) == "<image>\nWhat is it?\n"
    assert np.array_equal(np.asarray(chat.images[0]), np.asarray(image))
    expected = np.zeros((30, 40), bool)
    if "bbox" in task:
        expected[6:14, 4:14] = True
    else:
        expected[10:20, 20:30] = True
    assert np.array_equal(chat.regions[0], expected)


def test_a_document_to_draw_ends_where_the_picture_begins():
    chat = read_messages([{"role": "system", "content": "Draw."}, *question("a red cat", [tiny_image(0)])], "task", 0)

    assert drawing_prompt(chat) == "Draw.\n<image>a red cat<image_start>"


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
