"""Retrieval and linear probe of a CLIP, and two CLIPs on the same data, against what is computed by hand."""

import json

import pytest
import torch

from deem_plugin.cli import main
from deem_plugin.evaluation.clip import load_clip
from deem_plugin.evaluation.encoder import score_linear_probe
from deem_plugin.evaluation.questions import QuestionDataError
from deem_plugin.evaluation.retrieval import read_captions, score_retrieval

from ..tiny import tiny_image
from .mining_clip import save_mining_clip

CAPTIONS = {"a.jpg": ["a cat", "one cat, asleep"], "b.jpg": ["a dog", "two dogs | a fence"], "c.jpg": ["a cup", "tea"]}


class Features:
    """A stand-in for a CLIP with given features of texts."""

    def __init__(self, texts):
        self.texts = torch.tensor(texts, dtype=torch.float32)

    def text_features(self, texts):
        assert len(texts) == len(self.texts)
        return self.texts


def write(path, kind):
    rows = [(name, number, text) for name, texts in CAPTIONS.items() for number, text in enumerate(texts)]
    if kind == "coco":
        images = [{"id": 7 + index, "file_name": name} for index, name in enumerate(CAPTIONS)]
        ids = {image["file_name"]: image["id"] for image in images}
        annotations = [{"image_id": ids[name], "caption": f"{text}\n"} for name, _, text in rows]
        path.write_text(json.dumps({"images": images, "annotations": annotations}))
    elif kind == "karpathy":
        images = [
            {"filename": name, "split": "test", "sentences": [{"raw": text} for text in texts]}
            for name, texts in CAPTIONS.items()
        ]
        path.write_text(json.dumps({"images": [*images, {"filename": "x", "split": "train", "sentences": []}]}))
    elif kind == "token":
        path.write_text("".join(f"{name}#{number}\t{text}\n" for name, number, text in rows))
    else:
        lines = [f"{name}| {number}| {text.replace('|', ',')}" for name, number, text in rows]
        path.write_text("\n".join(["image_name| comment_number| comment", *lines]))
    return path


@pytest.mark.parametrize(
    ("kind", "name"),
    [("coco", "captions.json"), ("karpathy", "dataset.json"), ("token", "results.token"), ("csv", "results.csv")],
)
def test_captions_are_read_as_they_are_distributed(kind, name, tmp_path):
    expected = CAPTIONS
    if kind == "csv":
        expected = {picture: [text.replace("|", ",") for text in texts] for picture, texts in CAPTIONS.items()}

    assert read_captions(write(tmp_path / name, kind)) == expected


def test_recall_is_that_of_ranks_counted_by_hand_and_ties_count_against(tmp_path):
    write(tmp_path / "captions.json", "coco")
    for name in CAPTIONS:
        tiny_image(0).save(tmp_path / name)
    # Two texts each. a: right; b: its captions point at a; c: ties with everything.
    texts = [[1, 0, 0], [1, 0, 0], [1, 0, 0], [0.9, 0.1, 0], [0, 0, 0], [0, 0, 0]]

    result = score_retrieval(Features(texts), tmp_path / "captions.json", tmp_path, lambda paths: torch.eye(3))

    to_text, to_image = result["image to text"], result["text to image"]
    assert to_text["R@1"]["right"] == {
        "a.jpg": False,
        "b.jpg": True,
        "c.jpg": False,
    }  # a: b's caption ties with its own
    assert to_text["R@10"]["value"] == 1.0 and (result["pictures"], result["captions"]) == (3, 6)
    assert list(to_image["R@1"]["right"].values()) == [True, True, False, False, False, False]
    assert set(to_image["R@1"]["right"]) == {
        f"{name}#{2 * place + k}" for place, name in enumerate(CAPTIONS) for k in (0, 1)
    }


def test_a_file_of_another_kind_and_missing_pictures_are_errors(tmp_path):
    for name, text in (("a.json", "[1]"), ("b.json", "{"), ("c.csv", "no tabs"), ("d.json", '{"images": []}')):
        (tmp_path / name).write_text(text)
        with pytest.raises(QuestionDataError, match="no file of captions|holds no captions"):
            read_captions(tmp_path / name)
    (tmp_path / "e.token").write_bytes(b"\xe9.jpg#0\ttext")
    with pytest.raises(QuestionDataError, match="UnicodeDecodeError"):
        read_captions(tmp_path / "e.token")
    with pytest.raises(QuestionDataError, match=r"3 of 3 pictures are not in .* \(the first: a.jpg\)"):
        score_retrieval(Features([[1.0]]), write(tmp_path / "captions.json", "coco"), tmp_path, None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for part, start in (("fit", 0), ("test", 50)):
        for label, name in enumerate(("cat", "dog")):
            (folder / part / name).mkdir(parents=True)
            for index in range(6):
                image = tiny_image(start + 2 * index + label)
                image.point(lambda value, label=label: value // 2 + 100 * label).save(
                    folder / part / name / f"{index}.png"
                )
    for index, name in enumerate(CAPTIONS):
        tiny_image(index).save(folder / name)
    write(folder / "captions.json", "coco")
    save_mining_clip(folder / "first")
    second = save_mining_clip(folder / "second")
    with torch.no_grad():
        second.visual_projection.weight.mul_(-1)
    second.save_pretrained(folder / "second")
    return folder


def test_a_linear_probe_finds_what_is_plain_and_other_classes_are_an_error(data, tmp_path):
    clip = load_clip(str(data / "first"), device="cpu")

    result = score_linear_probe(clip, data / "fit", data / "test")

    assert result["pictures"] == 12 and result["accuracy"] == sum(result["right"].values()) / 12 > 0.8
    for name in ("cat", "cow"):
        (tmp_path / name).mkdir()
        tiny_image(0).save(tmp_path / name / "0.png")
    with pytest.raises(QuestionDataError, match="have other classes .cow is in one of them alone"):
        score_linear_probe(clip, data / "fit", tmp_path)


def test_two_encoders_are_compared_on_the_same_items(data, tmp_path, capsys):
    suites = ["--retrieval", str(data / "captions.json"), str(data), "--zero-shot", str(data / "test")]
    first, second = (str(data / name) for name in ("first", "second"))
    assert main(["eval-encoder", first, *suites, "--out", str(tmp_path / "first.json")]) == 0
    capsys.readouterr()

    tables = []
    for before in (first, str(tmp_path / "first.json")):
        assert main(["eval-encoder", second, *suites, "--before", before, "--out", str(tmp_path / "new.json")]) == 0
        tables.append(capsys.readouterr().out)

    assert tables[0] == tables[1] and "| image to text, R@1 |" in tables[0] and "zero-shot, 12 pictures" in tables[0]
    assert (tmp_path / "new.png").stat().st_size > 1000
    old, new = (json.loads((tmp_path / name).read_text())["retrieval"] for name in ("first.json", "new.json"))
    change = 100 * (new["text to image"]["R@1"]["value"] - old["text to image"]["R@1"]["value"])
    assert f"{change:+.1f} [" in next(line for line in tables[0].splitlines() if "text to image, R@1 " in line)
    # Scores of other data cannot be compared.
    assert (
        main(["eval-encoder", second, "--zero-shot", str(data / "fit"), "--before", str(tmp_path / "first.json")]) == 1
    )
    assert "were not evaluated on the same data" in capsys.readouterr().err
