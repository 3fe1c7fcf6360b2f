"""The demo's data: balanced, readable by the rooms that use it, and true."""

import json

import pytest
import torch

from deem_plugin.data.conversations import list_conversations
from deem_plugin.demo.scenes import COLOR_NAMES, SHAPES
from deem_plugin.demo.sets import (
    POPE_SUFFIX,
    pope_question,
    probe_scenes,
    training_questions,
    training_scenes,
    write_test_sets,
    write_training_set,
)


@pytest.fixture(scope="module")
def training_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    scenes, pictures = training_scenes(9, seed=0)
    return scenes, write_training_set(folder, scenes, pictures, seed=0)


def test_captions_are_conversations_of_one_turn(training_set, tmp_path):
    scenes, (captions, _) = training_set
    data = list_conversations(captions).read(cache_dir=tmp_path)
    assert len(data) == len(scenes)
    assert data[0]["messages"][1]["content"] == f"a {COLOR_NAMES[scenes.color[0]]} {SHAPES[scenes.shape[0]]}"


def test_questions_are_conversations_of_three_turns_that_ask_everything_once(training_set, tmp_path):
    scenes, (_, questions) = training_set
    data = list_conversations(questions).read(cache_dir=tmp_path)
    assert len(data) == 4 * len(scenes)
    assert all(len(row["messages"]) == 6 for row in data)
    about_first = [row for row in json.loads(questions.read_text()) if row["image"] == "images/0.png"]
    turns = [turn for row in about_first for turn in row["conversations"]]
    asked = [turn["value"].removeprefix("<image>\n") for turn in turns if turn["from"] == "human"]
    assert len(set(asked)) == 12
    assert sum(turn["value"] == "yes" for turn in turns) == 6


def test_training_questions_about_objects_tell_the_truth():
    scenes, _ = training_scenes(60, seed=0)
    for i, questions in enumerate(training_questions(scenes, torch.Generator().manual_seed(0))):
        present = pope_question(scenes.color[i], scenes.shape[i]) + POPE_SUFFIX
        for prompt, answer in questions[2:4]:
            assert (prompt == present) == (answer == "yes")
        for prompt, answer in questions[:2]:
            assert (prompt.split()[1] == SHAPES[scenes.shape[i]]) == (answer == "yes")


def test_article_of_a_question_fits_the_color():
    assert pope_question(COLOR_NAMES.index("orange"), 0) == "Is there an orange circle in the image?"
    assert pope_question(COLOR_NAMES.index("red"), 0) == "Is there a red circle in the image?"


def test_seeds_of_training_see_different_scenes_and_probes_are_fixed():
    assert not torch.equal(training_scenes(50, 0)[0].shape, training_scenes(50, 1)[0].shape)
    assert torch.equal(probe_scenes(50)[1], probe_scenes(50)[1])


@pytest.fixture(scope="module")
def test_sets(tmp_path_factory):
    home, cache = tmp_path_factory.mktemp("sets"), tmp_path_factory.mktemp("cache")
    write_test_sets(home, cache, count=6)
    return home, cache


def rows(path):
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


@pytest.mark.parametrize("split", ["a", "r", "v2"])
def test_robustvqa_asks_two_questions_an_image(test_sets, split):
    table = rows(test_sets[0] / "robustvqa" / f"robustvqa_{split}.parquet")
    assert len(table) == 12
    assert [row["answer"] for row in table[:2]] == ["yes", "no"]
    assert table[0]["image_id"] == table[1]["image_id"]
    assert table[0]["caption"] != table[1]["caption"]


def test_renditions_share_robustvqa_r(test_sets):
    sources = {row["source"] for row in rows(test_sets[0] / "robustvqa" / "robustvqa_r.parquet")}
    assert sources == {"r-outline", "r-grey", "r-inverted"}


def test_details_ask_eight_questions_an_image(test_sets):
    table = rows(test_sets[0] / "details" / "details.parquet")
    assert len(table) == 6 * 8
    assert {row["category"] for row in table} == {"horizontal", "vertical", "size", "background"}


def test_pope_is_imported_in_three_categories(test_sets):
    home, cache = test_sets
    for category in ("random", "popular", "adversarial"):
        lines = (home / "pope" / f"coco_pope_{category}.json").read_text().splitlines()
        questions = [json.loads(line) for line in lines]
        assert [question["label"] for question in questions] == ["yes", "no"] * 6
        assert all(yes["text"] != no["text"] for yes, no in zip(questions[::2], questions[1::2], strict=True))
    assert list((cache / "lmms-lab-encoder___pope").rglob("pope-test.arrow"))


def test_adversarial_questions_name_the_color_that_is_seen(test_sets):
    lines = (test_sets[0] / "pope" / "coco_pope_adversarial.json").read_text().splitlines()
    for yes, no in zip(lines[::2], lines[1::2], strict=True):
        assert json.loads(yes)["text"].split()[3] == json.loads(no)["text"].split()[3]
