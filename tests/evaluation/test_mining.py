"""Mining: the hardest wrong class that a rule admits, and batches that are the same after an interruption."""

import dataclasses

import pytest
import torch

from deem_plugin.evaluation import imagenet
from deem_plugin.evaluation.clip import load_clip
from deem_plugin.evaluation.mining import Mined, Rule, admitted_classes, mine, mine_pictures

from .mining_clip import save_mining_clip, write_pictures


def official_pairs(logits, labels, paths):
    """What the authors' builder does to a batch: it filters predictions and labels by the mask, but not the paths."""
    predictions = logits.argmax(dim=1)
    wrong = predictions != labels
    return list(zip(paths, labels[wrong].tolist(), predictions[wrong].tolist(), strict=False))


def test_a_wrong_class_stays_with_its_picture_where_the_authors_builder_shifts_it():
    """The builder of DEEM, App. E.1: after a picture that CLIP gets right, labels are shifted."""
    paths = ["cat.png", "dog.png", "hen.png", "owl.png"]
    labels = torch.tensor([0, 1, 2, 3])
    logits = torch.tensor([[9.0, 1, 1, 2], [5, 1, 2, 0], [0, 1, 9, 2], [1, 7, 2, 3]])  # right, wrong, right, wrong
    truth = {"dog.png": (1, 0), "owl.png": (3, 1)}

    mined = mine(logits, labels, admitted_classes(4, range(4)))
    ours = {path: (label, m.wrong) for path, label, m in zip(paths, labels.tolist(), mined, strict=True) if m.fooled}
    theirs = {path: (label, wrong) for path, label, wrong in official_pairs(logits, labels, paths)}

    assert ours == truth
    assert theirs == {"cat.png": (1, 0), "dog.png": (3, 1)}


def test_classes_that_are_no_candidates_or_refused_are_passed_over():
    logits = torch.tensor([[1.0, 9, 8, 7, 0]])
    label = torch.tensor([0])

    assert mine(logits, label, admitted_classes(5, range(5))) == [Mined(1, True)]
    assert mine(logits, label, admitted_classes(5, {0, 2, 3})) == [Mined(2, True)]
    assert mine(logits, label, admitted_classes(5, range(5), refused=[(0, 1), (0, 2)])) == [Mined(3, True)]
    assert mine(logits, label, admitted_classes(5, {0, 4})) == [Mined(4, False)]


@pytest.fixture
def setting(tmp_path):
    """Seven pictures, a CLIP, and a rule over the classes that the pictures are of."""
    save_mining_clip(tmp_path / "clip")
    classes = imagenet.wnids()[:7]
    pictures = imagenet.list_pictures(write_pictures(tmp_path / "pictures", classes, per_class=1))
    clip = load_clip(str(tmp_path / "clip"), device="cpu")
    rules = {"rule": Rule(clip.text_features(imagenet.clear_names()[:7]), admitted_classes(7, range(7)))}
    return pictures, clip, rules, tmp_path / "progress.jsonl"


def counting(clip, stop_after=None):
    """Returns the CLIP with a count of the batches it embeds, which is killed in the one after `stop_after`."""
    batches = []

    def preprocess(images):
        if len(batches) == stop_after:
            raise KeyboardInterrupt
        batches.append(len(images))
        return clip.preprocess(images)

    return dataclasses.replace(clip, preprocess=preprocess), batches


def test_an_interrupted_run_goes_on_after_its_last_whole_batch_with_the_same_result(setting):
    pictures, clip, rules, progress = setting
    whole = mine_pictures(pictures, clip, rules, progress.with_name("other.jsonl"), "key", batch_size=2)
    killed, _ = counting(clip, stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        mine_pictures(pictures, killed, rules, progress, "key", batch_size=2)
    with progress.open("a") as file:
        file.write('[{"rule": [1, tr')  # killed while it wrote

    resumed, batches = counting(clip)
    result = mine_pictures(pictures, resumed, rules, progress, "key", batch_size=2)

    assert batches == [2, 1]
    assert result == whole
    again, batches = counting(clip)
    assert mine_pictures(pictures, again, rules, progress, "key", batch_size=2) == whole and not batches


@pytest.mark.parametrize("changed", ["key", "batch size", "picture"])
def test_progress_of_other_work_is_not_taken_up(setting, changed):
    pictures, clip, rules, progress = setting
    mine_pictures(pictures, clip, rules, progress, "key", batch_size=4)
    if changed == "picture":
        (pictures.root / pictures.paths[0]).write_bytes(b"damaged")

    counted, batches = counting(clip)
    key, batch_size = ("other" if changed == "key" else "key"), (7 if changed == "batch size" else 4)
    results = mine_pictures(pictures, counted, rules, progress, key, batch_size)

    assert sum(batches) == (6 if changed == "picture" else 7)
    assert [result is None for result in results] == [changed == "picture"] + [False] * 6


def test_a_batch_without_one_readable_picture_is_passed_over(setting):
    pictures, clip, rules, progress = setting
    for path in pictures.paths[:2]:
        (pictures.root / path).write_bytes(b"damaged")

    assert mine_pictures(pictures, clip, rules, progress, "key", batch_size=2)[:2] == [None, None]


def test_features_are_not_asked_for_twice_by_two_rules(setting):
    pictures, clip, rules, progress = setting
    counted, batches = counting(clip)

    results = mine_pictures(pictures, counted, {**rules, "again": rules["rule"]}, progress, "key", batch_size=8)

    assert batches == [7]
    assert all(result["rule"] == result["again"] for result in results)
