"""Building RobustVQA: every picture keeps its label, the content is the same each time, nothing is dropped unsaid."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
import torch

from deem_plugin.data.images import load_image
from deem_plugin.evaluation import imagenet, robustvqa
from deem_plugin.evaluation.clip import load_clip
from deem_plugin.evaluation.manifest import MANIFEST
from deem_plugin.evaluation.questions import QuestionDataError
from deem_plugin.evaluation.robustvqa_build import TEMPLATE, build_robustvqa, check_row

from ..tiny import tiny_image
from .helpers import offline_env, robustvqa_rows
from .mining_clip import save_mining_clip, write_pictures


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    save_mining_clip(folder)
    return str(folder)


@pytest.fixture(scope="session")
def photographs(shared_dir):
    return sorted((shared_dir / "data" / "imagenet-sample").glob("*/*.jpg"))


def lay_out(photographs, root):
    """Copies photographs into three splits as they are distributed: wnid folders, and folders 0..999 for V2."""
    for number, photograph in enumerate(photographs):
        split, wnid = ("a", "r", "v2")[number % 3], photograph.parent.name
        name = str(imagenet.wnids().index(wnid)) if split == "v2" else wnid
        (root / split / name).mkdir(parents=True)
        shutil.copy(
            photograph, root / split / name / photograph.with_suffix((".jpg", ".JPEG", ".jpeg")[number % 3]).name
        )
    return {split: root / split for split in ("a", "r", "v2")}


def rows_of(path):
    return pq.read_table(path).to_pylist()


def check_labels(out, folders, clip_path, protocol="corrected"):
    """Compares every row with its folder and its picture, and the wrong class with CLIP's scores, worked out anew."""
    clip = load_clip(clip_path, device="cpu")
    names = imagenet.clear_names() if protocol == "corrected" else imagenet.published_names()
    texts = clip.text_features([TEMPLATE.format(name) for name in names], normalize=protocol == "corrected")
    for split, folder in folders.items():
        rows = rows_of(out / f"robustvqa_{split}.parquet")
        asked = 0
        classes = sorted(imagenet.folder_class(path.name) for path in folder.iterdir())
        candidates = range(1000) if protocol == "official" else classes
        for path in sorted(folder.glob("*/*")):
            label = imagenet.folder_class(path.parent.name)
            scores = texts @ clip.image_features([load_image(path)])[0]
            admitted = [
                index
                for index in candidates
                if index != label and (protocol == "official" or (label, index) not in imagenet.same_thing())
            ]
            wrong = max(admitted, key=lambda index: scores[index])
            questions = [row for row in rows if row["source"] == path.relative_to(folder).as_posix()]
            if scores[wrong] <= scores[label]:
                assert questions == []
                continue
            asked += 2
            assert [(row["answer"], row["caption"]) for row in questions] == [
                ("yes", names[label]),
                ("no", names[wrong]),
            ]
            assert all(row["image"]["bytes"] == path.read_bytes() for row in questions)
        assert asked == len(rows) > 0


@pytest.mark.parametrize("protocol", ["corrected", "official"])
def test_every_row_has_the_label_of_its_folder_and_the_class_that_clip_mistakes_it_for(
    tmp_path, clip, photographs, protocol
):
    folders = lay_out(photographs[:24], tmp_path)
    # Some pictures that CLIP gets right, in between: they have to go without moving the labels of the others.
    first = build_robustvqa(folders, clip, tmp_path / "first", protocol=protocol, device="cpu")
    moved = make_right(folders["a"], tmp_path / "first" / "robustvqa_a.parquet", protocol)

    manifest = build_robustvqa(folders, clip, tmp_path / "out", protocol=protocol, batch_size=3, device="cpu")

    check_labels(tmp_path / "out", folders, clip, protocol)
    assert first["splits"]["a"]["pictures"] == 8
    assert manifest["splits"]["a"]["kept"] == first["splits"]["a"]["kept"] - moved


def make_right(folder, questions, protocol):
    """Moves every third picture to the folder of the class that CLIP takes it for; returns how many."""
    names = imagenet.clear_names() if protocol == "corrected" else imagenet.published_names()
    moved = 0
    for row in rows_of(questions)[1::6]:
        target = folder / imagenet.wnids()[names.index(row["caption"])]
        target.mkdir(exist_ok=True)
        (folder / row["source"]).rename(target / f"moved-{moved}.jpg")
        moved += 1
    return moved


def test_two_builds_are_equal_and_the_manifest_tells_how_they_were_made(tmp_path, clip, photographs):
    folders = lay_out(photographs[:9], tmp_path)

    one, two = (build_robustvqa(folders, clip, tmp_path / name, device="cpu") for name in ("one", "two"))

    assert one == two
    assert json.loads((tmp_path / "one" / MANIFEST).read_text())["content_hash"] == one["content_hash"]
    assert one["clip"]["weights_sha256"] == load_clip(clip, device="cpu").weights_hash()
    assert one["options"] == {"protocol": "corrected", "candidates": "split", "template": TEMPLATE, "batch_size": 64}
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        MANIFEST,
        "robustvqa_a.parquet",
        "robustvqa_r.parquet",
        "robustvqa_v2.parquet",
    ]
    other = build_robustvqa(folders, clip, tmp_path / "all", candidates="all", device="cpu")
    assert other["content_hash"] != one["content_hash"]
    assert other["splits"]["a"]["candidate_classes"] == 1000 and one["splits"]["a"]["candidate_classes"] == 3


@pytest.mark.slow
def test_a_build_of_all_photographs_that_is_killed_resumes_to_the_same_content(tmp_path, clip, photographs):
    """Killed by the system, in a process of its own, while it mines the second split."""
    folders = lay_out(photographs, tmp_path)
    whole = build_robustvqa(folders, clip, tmp_path / "whole", batch_size=8, device="cpu")
    check_labels(tmp_path / "whole", folders, clip)
    assert sum(counts["pictures"] for counts in whole["splits"].values()) == 500
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "deem_plugin", "robustvqa", "build", "--clip", clip, "--out", str(out)]
    command += [f"--imagenet-{split}={folder}" for split, folder in folders.items()] + ["--batch-size", "8"]
    progress = out / ".progress" / "r.jsonl"
    environment = {**offline_env(tmp_path), "CUDA_VISIBLE_DEVICES": ""}

    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (progress.is_file() and progress.read_text().count("\n") > 4):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    mined = progress.read_text().count("\n") - 1
    assert 4 <= mined < len(list(folders["r"].glob("*/*"))) / 8 and not (out / MANIFEST).exists()

    subprocess.run(command, env=environment, check=True)

    resumed = json.loads((out / MANIFEST).read_text())
    assert (resumed["content_hash"], resumed["files"]) == (whole["content_hash"], whole["files"])


def test_pairs_of_one_thing_are_refused_and_counted(tmp_path, clip, monkeypatch):
    """A CLIP that takes every picture for sunglasses: the lens, n04355933, is not asked about as if it were not."""
    lens, glasses, hen = (imagenet.wnids().index(wnid) for wnid in ("n04355933", "n04356056", "n01514859"))
    write_pictures(tmp_path / "a", ["n04355933", "n04356056", "n01514859"], per_class=1)
    model = load_clip(clip, device="cpu")

    def image_features(images):
        """Nearest to sunglasses, then hen, then the rest."""
        return torch.tensor([[1.0, 0.5, 0]]).repeat(len(images), 1)

    def text_features(texts, normalize=True):
        features = torch.zeros(len(texts), 3)
        features[:, 2] = 1
        features[glasses] = torch.tensor([1.0, 0, 0])
        features[hen] = torch.tensor([0, 1.0, 0])
        return features

    monkeypatch.setattr(model, "image_features", image_features)
    monkeypatch.setattr(model, "text_features", text_features)
    monkeypatch.setattr("deem_plugin.evaluation.robustvqa_build.load_clip", lambda *_: model)

    manifest = build_robustvqa({"a": tmp_path / "a"}, clip, tmp_path / "out")

    pairs = {row["source"]: row["caption"] for row in rows_of(tmp_path / "out" / "robustvqa_a.parquet")[1::2]}
    assert pairs == {"n01514859/0.png": "sunglasses", "n04355933/0.png": "hen"}
    counts = manifest["splits"]["a"]
    assert counts["refused_pairs"] == 1
    assert counts["pictures_by_protocol"] == {
        "same": 1,
        "other_wrong_class": 1,
        "only_corrected": 0,
        "only_official": 0,
    }
    official = build_robustvqa({"a": tmp_path / "a"}, clip, tmp_path / "official", protocol="official")
    pairs = {row["source"]: row["caption"] for row in rows_of(tmp_path / "official" / "robustvqa_a.parquet")[1::2]}
    assert pairs == {"n01514859/0.png": "sunglasses", "n04355933/0.png": "sunglasses"}
    assert official["options"]["candidates"] == "all"


def test_the_official_protocol_leaves_out_pairs_of_equal_names(tmp_path, clip, monkeypatch):
    """Both classes are called "crane": the same question would have both answers."""
    bird, machine = (imagenet.wnids().index(wnid) for wnid in ("n02012849", "n03126707"))
    write_pictures(tmp_path / "a", ["n02012849", "n01514859"], per_class=1)
    model = load_clip(clip, device="cpu")
    features = torch.zeros(1000, 1)
    features[machine] = 1
    monkeypatch.setattr(model, "image_features", lambda images: torch.ones(len(images), 1))
    monkeypatch.setattr(model, "text_features", lambda texts, normalize=True: features)
    monkeypatch.setattr("deem_plugin.evaluation.robustvqa_build.load_clip", lambda *_: model)

    manifest = build_robustvqa({"a": tmp_path / "a"}, clip, tmp_path / "out", protocol="official")
    corrected = build_robustvqa({"a": tmp_path / "a"}, clip, tmp_path / "corrected", candidates="all")

    assert manifest["splits"]["a"]["equal_names_in_official"] == 1
    assert {row["caption"] for row in rows_of(tmp_path / "out" / "robustvqa_a.parquet")} == {"hen", "crane"}
    rows = rows_of(tmp_path / "corrected" / "robustvqa_a.parquet")
    assert [row["caption"] for row in rows] == ["hen", "construction crane", "crane bird", "construction crane"]
    assert corrected["splits"]["a"]["pictures_by_protocol"]["only_corrected"] == 1


def test_unreadable_pictures_fail_the_build_by_name_and_are_left_out_when_told_so(tmp_path, clip):
    root = write_pictures(tmp_path / "a", ["n01440764", "n01514859", "n02012849"])
    broken = ["n01514859/0.png", "n02012849/1.png"]
    for name in broken:
        os.truncate(root / name, (root / name).stat().st_size // 2)

    with pytest.raises(QuestionDataError, match=r"2 of 6 pictures in .* cannot be read: n01514859/0.png, n02012849/1"):
        build_robustvqa({"a": root}, clip, tmp_path / "out", device="cpu")
    assert not list((tmp_path / "out").glob("*.parquet"))

    manifest = build_robustvqa({"a": root}, clip, tmp_path / "out", skip_unreadable=True, device="cpu")
    assert manifest["splits"]["a"]["unreadable"] == 2 and manifest["splits"]["a"]["unreadable_files"] == broken
    assert not {row["source"] for row in rows_of(tmp_path / "out" / "robustvqa_a.parquet")} & set(broken)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folders": {}}, "Give at least one folder"),
        ({"protocol": "published"}, "Unknown protocol 'published'; choose one of corrected, official"),
        ({"candidates": "some"}, "Unknown candidates 'some'; choose one of split, all"),
        ({"protocol": "official", "candidates": "split"}, "official protocol mines over all 1,000 classes"),
        ({"batch_size": 0}, "`--batch-size` must be positive, got 0"),
    ],
)
def test_unknown_options_are_refused_before_any_work(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        build_robustvqa(**{"folders": {"a": tmp_path}, "clip_name": "none", "out": tmp_path / "out", **options})


def test_unknown_wnids_fail_the_build(tmp_path, clip):
    write_pictures(tmp_path / "a", ["n01440764", "n00000001"])
    with pytest.raises(QuestionDataError, match="no class of ImageNet-1k"):
        build_robustvqa({"a": tmp_path / "a"}, clip, tmp_path / "out")


@pytest.mark.parametrize(("caption", "answer"), [("hen", "yes"), ("tench", "no")])
def test_a_row_that_contradicts_its_folder_is_caught(caption, answer):
    row = {"source": "n01440764/0.jpg", "caption": caption, "answer": answer}
    with pytest.raises(
        QuestionDataError, match=f"n01440764/0.jpg is of the class 'tench', but .*'{caption}' is '{answer}'"
    ):
        check_row(row, imagenet.clear_names())


@pytest.mark.parametrize("change", ["rows", "manifest", "split"])
def test_the_tasks_refuse_data_that_does_not_match_its_manifest(tmp_path, clip, monkeypatch, change):
    write_pictures(tmp_path / "a", ["n01440764", "n01514859"], per_class=1)
    out = tmp_path / "out"
    build_robustvqa({"a": tmp_path / "a"}, clip, out, device="cpu")
    monkeypatch.setenv("DEEM_ROBUSTVQA", str(out))
    assert robustvqa.robustvqa_file("a") == str(out / "robustvqa_a.parquet")
    split, message = "a", "robustvqa_a.parquet does not match .*manifest.json: its content hash is"

    if change == "rows":
        robustvqa.write_robustvqa(
            [{**row, "image": tiny_image(7)} for row in robustvqa_rows()], out / "robustvqa_a.parquet"
        )
    elif change == "manifest":
        (out / MANIFEST).write_text('{"files": ')
        message = "manifest.json is no manifest of question files"
    else:
        robustvqa.write_robustvqa(robustvqa_rows("r"), out / "robustvqa_r.parquet")
        split, message = "r", "robustvqa_r.parquet is not in .*manifest.json, which names robustvqa_a.parquet"
    with pytest.raises(QuestionDataError, match=message):
        robustvqa.robustvqa_file(split)
