"""ImageNet's classes: clear names, pairs that are one thing, and folders as they are distributed."""

import pytest

from deem_plugin.evaluation import imagenet
from deem_plugin.evaluation.questions import QuestionDataError

from .mining_clip import write_pictures


def index(wnid: str) -> int:
    return imagenet.wnids().index(wnid)


def test_names_that_several_classes_bear_are_told_apart():
    crane_bird, crane = index("n02012849"), index("n03126707")
    published, clear = imagenet.published_names(), imagenet.clear_names()

    assert published[crane_bird] == published[crane] == "crane"
    assert (clear[crane_bird], clear[crane]) == ("crane bird", "construction crane")
    assert imagenet.classes_called("crane") == {crane_bird, crane}
    assert published[index("n03710637")] == published[index("n03710721")] == "maillot"
    assert clear[index("n02113186")] == "Cardigan Welsh Corgi" and clear[index("n02963159")] == "knitted cardigan"
    assert (clear[index("n03773504")], clear[index("n04008634")]) == ("missile", "projectile")
    # What is still equal is one thing, and never asked about against the other.
    plain = list(map(imagenet.plain, clear))
    equal = {
        (one, other) for one in range(1000) for other in range(1000) if one != other and plain[one] == plain[other]
    }
    assert equal <= imagenet.same_thing()


def test_the_published_names_are_those_of_the_authors_questions():
    names = imagenet.published_names()
    wnids = {
        "n01484850": "great_white_shark",
        "n04548280": "wall_clock",
        "n04285008": "sports_car",
        "n04355933": "sunglass",
    }
    assert {wnid: names[index(wnid)] for wnid in wnids} == wnids


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("n04355933", "n04356056", True),  # sunglass, sunglasses
        ("n01871265", "n02504458", True),  # tusker, African elephant
        ("n02128757", "n02128385", True),  # snow leopard, leopard
        ("n03642806", "n03832673", True),  # laptop, notebook
        ("n02012849", "n03126707", False),  # the two cranes
        ("n02129604", "n02129165", False),  # tiger, lion
    ],
)
def test_classes_that_are_one_thing_are_known_both_ways_round(one, other, same):
    pairs = imagenet.same_thing()
    assert ((index(one), index(other)) in pairs) == ((index(other), index(one)) in pairs) == same


def test_folders_of_wnids_and_of_class_indices_are_read_alike(tmp_path):
    wnids = write_pictures(tmp_path / "a", ["n02012849", "n01440764"], suffix=".JPEG")
    (wnids / "README.txt").write_text("not a class")
    (wnids / "n01440764" / "notes.txt").write_text("not a picture")
    indices = write_pictures(tmp_path / "v2", ["999", "0", "134"], per_class=1, suffix=".jpeg")

    by_wnid, by_index = imagenet.list_pictures(wnids), imagenet.list_pictures(indices)

    assert by_wnid.paths == ("n01440764/0.JPEG", "n01440764/1.JPEG", "n02012849/0.JPEG", "n02012849/1.JPEG")
    assert by_wnid.labels == (0, 0, 134, 134) and by_wnid.ignored == 1
    # By number: as text, 134 would come before 9.
    assert (by_index.paths, by_index.labels) == (("0/0.jpeg", "134/0.jpeg", "999/0.jpeg"), (0, 134, 999))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["n01440764", "n99999999"], r"1 folders that are no class of ImageNet-1k \(n99999999\)"),
        (["imagenetv2-top-images"], "no class of ImageNet-1k .*Give the folder that holds the class folders"),
        (["1000"], "no class of ImageNet-1k"),
        (["0", "n01443537"], "mixes folders called by wnid and by class index"),
        (["7", "007"], "two folders of one class"),
        ([], "holds no picture"),
    ],
)
def test_folders_that_are_no_data_set_are_refused(tmp_path, classes, message):
    (tmp_path / "data").mkdir()
    with pytest.raises(QuestionDataError, match=message):
        imagenet.list_pictures(write_pictures(tmp_path / "data", classes))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(QuestionDataError, match=f"No such folder: {tmp_path}/gone"):
        imagenet.list_pictures(tmp_path / "gone")
