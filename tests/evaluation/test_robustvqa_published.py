"""The authors' file: entries that do not fit their picture are named, and one that fits becomes the same questions."""

import json

import pyarrow.parquet as pq
import pytest

from deem_plugin import cli
from deem_plugin.evaluation import robustvqa
from deem_plugin.evaluation.questions import QuestionDataError
from deem_plugin.evaluation.robustvqa_published import check_published, import_published

from .mining_clip import write_pictures


def entry(file_name, right, wrong):
    return {"file_name": file_name, "gt_caption": right, "error_caption": wrong}


@pytest.fixture
def folders(tmp_path):
    a = write_pictures(tmp_path / "a", ["n01440764", "n01484850", "n01514859", "n02012849"], per_class=1)
    return {"a": a, "v2": write_pictures(tmp_path / "v2", ["0", "8"], per_class=1)}


RIGHT = {
    "imagenet_a": [
        entry("imagenet-a/n01440764/0.png", "tench", "wall_clock"),
        entry("imagenet-a/n01484850/0.png", "great_white_shark", "hen"),
        entry("imagenet-a/n02012849/0.png", "crane", "tench"),
    ],
    "imagenet_v2": [entry("/data/v2/8/0.png", "hen", "great white shark")],
}


def write(tmp_path, data):
    path = tmp_path / "robustvqa_test.json"
    path.write_text(json.dumps(data))
    return path


def test_a_file_that_fits_is_imported_with_its_own_wording(tmp_path, folders, monkeypatch):
    file = write(tmp_path, RIGHT)
    assert check_published(file, folders).mismatches == []

    manifest = import_published(file, folders, tmp_path / "out")

    rows = pq.read_table(tmp_path / "out" / "robustvqa_a.parquet").to_pylist()
    expected = [
        (picture["file_name"], caption, answer)
        for picture in RIGHT["imagenet_a"]
        for caption, answer in ((picture["gt_caption"], "yes"), (picture["error_caption"], "no"))
    ]
    assert [(f"imagenet-a/{row['source']}", row["caption"], row["answer"]) for row in rows] == expected
    assert all(row["image"]["bytes"] == (folders["a"] / row["source"]).read_bytes() for row in rows)
    assert manifest["splits"] == {"a": {"kept": 3, "questions": 6}, "v2": {"kept": 1, "questions": 2}}
    monkeypatch.setenv("DEEM_ROBUSTVQA", str(tmp_path / "out"))
    assert robustvqa.robustvqa_file("v2")


@pytest.mark.parametrize(
    ("wrong_entry", "reason"),
    [
        (entry("a/n01440764/0.png", "tench", "hen"), "the picture comes twice"),
        (entry("a/n01514859/9.png", "hen", "tench"), "there is no such picture"),
        (entry("a/n01514859/0.png", "tench", "wall_clock"), "gt_caption is 'tench', but the folder is of 'hen'"),
        (entry("a/n01514859/0.png", "hen", "unicorn"), "error_caption 'unicorn' is no class"),
        (entry("a/n01514859/0.png", "hen", "hen"), "error_caption 'hen' is true of the picture, too"),
    ],
)
def test_an_entry_that_does_not_fit_is_named_with_the_reason(tmp_path, folders, wrong_entry, reason):
    file = write(tmp_path, {**RIGHT, "imagenet_a": [*RIGHT["imagenet_a"], wrong_entry]})

    (mismatch,) = check_published(file, folders).mismatches

    assert (mismatch.key, mismatch.index, mismatch.file_name) == ("imagenet_a", 3, wrong_entry["file_name"])
    assert reason in mismatch.reason
    with pytest.raises(QuestionDataError, match=r"does not fit the images in 1 places.*\nimagenet_a\[3\]"):
        import_published(file, folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_shift_of_the_authors_builder_is_found(tmp_path, folders):
    """Captions that belong to the next picture, as after a picture that was filtered from the labels alone."""
    names = ["n01440764/0.png", "n01484850/0.png", "n01514859/0.png"]
    captions = [("great_white_shark", "hen"), ("hen", "tench")]
    shifted = [entry(name, *pair) for name, pair in zip(names, captions, strict=False)]

    mismatches = check_published(write(tmp_path, {"imagenet_a": shifted}), {"a": folders["a"]}).mismatches

    assert [mismatch.index for mismatch in mismatches] == [0, 1]
    assert all("gt_caption" in mismatch.reason for mismatch in mismatches)


def test_flat_folders_of_made_up_input_are_reported_entry_by_entry(shared_dir, folders):
    """F6's input is in the authors' format, with pictures that lie in no class folder."""
    file = shared_dir / "parity" / "f6_robustvqa_test.json"
    published = check_published(file, folders)
    reasons = {(mismatch.key, mismatch.index) for mismatch in published.mismatches}
    assert len(published.entries["a"]) == 7
    assert reasons == {("imagenet_a", index) for index in range(7)} | {("imagenet_v2", index) for index in range(6)}
    assert "its folder is no class of ImageNet-1k" in {mismatch.reason for mismatch in published.mismatches}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no readable JSON file"),
        ("[]", "needs a list under each of imagenet_a, imagenet_v2"),
        ('{"imagenet_a": []}', "needs a list under each of imagenet_a, imagenet_v2"),
        (
            '{"imagenet_a": [{"file_name": "x"}], "imagenet_v2": []}',
            r"imagenet_a\[0\] needs the texts file_name, gt_caption, error_caption",
        ),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, folders, text, message):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(QuestionDataError, match=message):
        check_published(tmp_path / "file.json", folders)


def test_the_commands_report_and_fail_as_they_should(tmp_path, folders, capsys):
    given = [f"--imagenet-{split}={folder}" for split, folder in folders.items()]
    right = str(write(tmp_path, RIGHT))
    assert cli.main(["robustvqa", "check", right, *given]) == 0
    assert capsys.readouterr().out == "0 mismatches in 4 entries.\n"
    assert cli.main(["robustvqa", "import", right, *given, "--out", str(tmp_path / "out")]) == 0
    assert "robustvqa_a: 6 questions about 3 pictures" in capsys.readouterr().out

    wrong = {**RIGHT, "imagenet_v2": [entry("v2/8/0.png", "tench", "hen")]}
    assert cli.main(["robustvqa", "check", str(write(tmp_path, wrong)), *given]) == 1
    out = capsys.readouterr().out
    assert "imagenet_v2[0] v2/8/0.png: gt_caption is 'tench', but the folder is of 'hen'" in out
    assert out.endswith("2 mismatches in 4 entries.\n")
