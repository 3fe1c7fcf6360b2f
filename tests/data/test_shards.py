"""Shards as tables: what is left out is counted, what is broken named, and samples are read from any place."""

import io
import json
import os
import sys
import tarfile

import fsspec
import pytest
from PIL import Image

from deem_plugin.data.document_collator import DocumentCollator
from deem_plugin.data.examples import Examples
from deem_plugin.data.shards import list_interleaved, list_pairs, list_pictures, list_shards
from deem_plugin.data.tables import BrokenSample

from ..models.tiny_deem import tiny_deem
from .shard_files import jpeg, web_document, write_tar


@pytest.fixture
def load(tmp_path):
    return lambda listing, on_error="raise", **options: Examples.of([listing], on_error, tmp_path / "cache", **options)


@pytest.fixture
def check(tmp_path):
    return lambda listing: listing.check(tmp_path / "cache")


def read(document):
    """A document in short: its texts, and the colour of its pictures."""
    return [part["text"] or part["image"].getpixel((0, 0))[0] // 50 for part in document["parts"]]


def gray(value):
    """A picture that `read` calls by a number."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value * 50 + 20,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def test_pictures_stand_beside_their_texts_and_in_front_or_behind_anew_each_epoch(tmp_path, load):
    images = [("a.png", 0, 0.3, gray(0)), ("b.png", 2, 0.3, gray(1))]
    shard = write_tar(tmp_path / "a.tar", web_document("0", ["one ", "two", "three"], images))

    examples = load(list_interleaved(shard))

    seen = [tuple(read(examples[epoch])) for epoch in range(30)]
    assert set(seen) == {
        (0, "one two", 1, "three"),
        (0, "one two three", 1),
        ("one", 0, "two", 1, "three"),
        ("one", 0, "two three", 1),
    }
    assert seen == [tuple(read(examples[epoch])) for epoch in range(30)]
    assert seen != [tuple(read(load(list_interleaved(shard), seed=1)[epoch])) for epoch in range(30)]
    assert examples[0]["learn_from"] == 0


def test_half_of_the_pictures_stand_in_front_and_half_of_the_single_ones_stay(tmp_path, check):
    files = {}
    for key in range(400):
        files |= web_document(f"{key:04}", ["a text"], [("a.png", 0, 0.3, gray(1))])

    checked = check(list_interleaved(write_tar(tmp_path / "a.tar", files)))

    assert 160 < len(checked.whole) < 240
    assert checked.left_out == {"document with one image": 400 - len(checked.whole)}
    examples = Examples([(checked.whole, list_interleaved(str(tmp_path / "a.tar")).open)])
    front = sum(examples[index]["parts"][0]["text"] is None for index in range(len(examples)))
    assert 0.35 < front / len(examples) < 0.65


def test_every_reason_is_counted_for_interleaved_documents(tmp_path, check, load):
    good = ("a.jpg", 0, 0.3, jpeg())
    files = (
        web_document("0", ["many"], [(f"{i}.jpg", 0, 0.3, jpeg()) for i in range(8)])
        | web_document("1", ["unlike"], [("a.jpg", 0, 0.23, jpeg()), ("b.jpg", 0, float("nan"), jpeg())])
        | web_document("2", ["none"], [])
        | web_document("3", ["see <image>"], [good])
        | web_document("4", ["broken"], [("c.jpg", 0, 0.3, jpeg()[:60]), ("b.jpg", 0, 0.3, None), good])
        | web_document("5", ["far"], [("a.jpg", 1, 0.3, jpeg())])
        | {"6.json": "{"}
        | {"7.json": json.dumps({"text_list": ["a"], "image_info": [{"image_name": "a.jpg"}]})}
        | web_document("8", ["null"], [("a.jpg", 0, None, jpeg())])
        | web_document("9", [None], [good])
    )
    listing = list_interleaved(write_tar(tmp_path / "a.tar", files), keep_single=1.0, incomplete=True)

    checked, examples = check(listing), load(listing, "skip")

    assert checked.samples == 10 and checked.left_out == {
        "image beyond the most": 2,
        "image unlike its text": 2,
        "document without image": 2,
        "mark within the text": 1,
        "missing image": 1,
        "broken record": 5,
    }
    assert (
        len(checked.problems) == 5 and f"{tmp_path / 'a.tar'}::8 is not as expected: TypeError" in checked.problems[3]
    )
    assert [sum(part["image"] is not None for part in examples[index]["parts"]) for index in range(2)] == [6, 1]
    assert [examples[index]["skipped"] for index in range(2)] == [{}, {"unreadable image": 1}]


def test_every_reason_is_counted_for_pairs(tmp_path, check):
    files = {"0.jpg": jpeg(), "0.txt": " too short "} | {"1.jpg": jpeg(), "1.txt": b"\xff\xfe no text"}
    files |= {"2.txt": "no picture at all"} | {"3.jpg": jpeg(), "3.txt": "an <image> of it"} | {"4.jpg": jpeg()}
    files |= {"5.jpg": jpeg(), "5.json": '{"caption": null}'} | {"6.jpg": jpeg(), "6.json": '{"caption": ["a"]}'}
    files |= {"7.jpg": jpeg(), "7.txt": "a caption that stays"}

    checked = check(list_pairs(write_tar(tmp_path / "a.tar", files)))

    assert checked.left_out == {"short caption": 1, "mark within the text": 1, "broken record": 5}
    assert any(
        "::5 is not as expected: its caption is None; expected a text" in problem for problem in checked.problems
    )
    assert checked.whole["texts"][:] == [["a caption that stays"]]


def test_a_damaged_picture_is_skipped_for_the_next_or_refused(tmp_path, load):
    files = {"0.jpg": jpeg()[:60], "0.txt": "a damaged picture", "1.jpg": jpeg(), "1.txt": "a picture that is whole"}
    shard = write_tar(tmp_path / "a.tar", files)

    example = load(list_pairs(shard), "skip")[0]

    assert "a picture that is whole" in read(example) and example["skipped"] == {"unreadable image": 1}
    with pytest.raises(BrokenSample, match=r"at byte \d+ of .*a.tar cannot be read"):
        load(list_pairs(shard))[0]
    with pytest.raises(ValueError, match="None of 1 samples can be opened: {'unreadable image': 1}"):
        load(list_pairs(write_tar(tmp_path / "b.tar", {"0.jpg": b"", "0.txt": "a damaged picture"})), "skip")[0]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (web_document("0", ["a"], [("a.jpg", 0, 0.3, None)]), r"image .*a.tar::0.a.jpg is not in its shard"),
        (web_document("0", ["a"], [("a.jpg", 3, 0.3, b"")]), "belongs to text 3 of 1"),
        ({"0.json": "[]"}, "a.tar::0 .* JSON lacks one of text_list, image_info"),
        (web_document("0", "text", [("a.jpg", 0, 0.3, jpeg())]), "its `text_list` is 'text'; expected a list"),
        (
            web_document("0", ["\ud800"], [("a.jpg", 0, 0.3, jpeg())] * 2),
            "'.*a.tar::0' is not .*surrogates not allowed",
        ),
        ({"0.json": "[" * 100_000}, "a.tar::0 is not as expected: RecursionError"),
        ({"0.jpg": b""}, r"with the files \['jpg'\] it has no readable .json"),
    ],
)
def test_what_is_broken_raises_by_default(tmp_path, load, files, message):
    with pytest.raises(ValueError, match=f"(?s)1 of 1 samples of .*{message}"):
        load(list_interleaved(write_tar(tmp_path / "a.tar", files)))


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_a_shard_that_is_cut_off_or_compressed_is_named_even_when_skipping(tmp_path, load, suffix):
    path = tmp_path / f"a.{suffix}"
    write_tar(path, {"0.jpg": bytes(5000), "0.txt": "a long caption"})
    if suffix == "tar":
        path.write_bytes(path.read_bytes()[:3000])
    else:
        with tarfile.open(path, "w:gz") as archive:
            archive.add(__file__, "0.txt")

    with pytest.raises(ValueError, match=f"a.{suffix} is damaged, cut off or compressed"):
        load(list_pairs(str(path)), "skip")


def test_shards_of_a_mac_and_endings_in_capitals_are_read(tmp_path, load):
    litter = {"._0.JPG": b"\0\5", "__MACOSX/._0.TXT": b"\0\5"}
    write_tar(tmp_path / "a.tar", {"._0.JPG": b"\0\5", "0.JPG": jpeg(), "._0.TXT": b"\0", "0.TXT": "a caption of it"})
    mmc4 = {"1.JSON": web_document("1", ["one", "two"], [(f"{i}.PNG", i, 0.3, None) for i in range(2)])["1.json"]}
    write_tar(tmp_path / "b.tar", mmc4 | litter | {"1.0.png": gray(1), "._1.0.png": b"\0", "1.1.Png": gray(2)})
    (tmp_path / "._a.tar").write_bytes(b"\0\5")

    (pair,) = (load(list_pairs(str(tmp_path / "*a.tar")))[index] for index in range(1))
    (document,) = (load(list_interleaved(str(tmp_path / "b.tar")))[index] for index in range(1))

    assert "a caption of it" in read(pair) and sorted(map(str, read(document)))[:2] == ["1", "2"]


def test_processes_list_what_one_lists(tmp_path, check):
    for shard in range(3):
        files = {"0.jpg": jpeg(), "0.txt": f"the caption of {shard}", "1.jpg": jpeg(), "1.txt": "short"}
        write_tar(tmp_path / f"{shard}.tar", files)

    listings = [list_pairs(str(tmp_path / "*.tar"), processes=processes) for processes in (1, 2)]
    one, two = (listing.check(tmp_path / str(number)) for number, listing in enumerate(listings))

    assert one.left_out == two.left_out == {"short caption": 3} and one.whole["texts"][:] == two.whole["texts"][:]


def test_a_changed_shard_is_listed_again(tmp_path, check):
    path = write_tar(tmp_path / "a.tar", {"0.jpg": jpeg(), "0.txt": "a caption of it"})
    assert check(list_pairs(path)).samples == 1
    write_tar(tmp_path / "a.tar", {f"{i}.{end}": "a caption of it" for i in range(2) for end in ("txt", "jpg")})

    assert check(list_pairs(path)).samples == 2


def test_globs_are_sorted_and_addresses_stay_addresses(tmp_path):
    paths = [write_tar(tmp_path / f"pairs-{number}.tar", {}) for number in (1, 0)]
    assert list_shards(str(tmp_path / "pairs-*.tar")) == paths[::-1]
    assert list_shards(["memory://x/a.tar"]) == ["memory://x/a.tar"]
    with pytest.raises(ValueError, match="No shard is found at .*none-"):
        list_shards(str(tmp_path / "none-*.tar"))
    with pytest.raises(ValueError, match="There is no shard .*none.tar"):
        list_pairs(str(tmp_path / "none.tar"))
    (tmp_path / "folder.tar").mkdir()
    with pytest.raises(ValueError, match="There is no shard .*folder.tar"):
        list_pairs(str(tmp_path / "folder.tar"))


def test_shards_behind_an_address_are_read(tmp_path, load):
    remote = fsspec.filesystem("memory")
    path = write_tar(tmp_path / "a.tar", {"0.png": gray(3), "0.txt": "a caption of it"})
    with open(path, "rb") as file:
        remote.pipe("/deem/pairs-0.tar", file.read())

    (example,) = (load(list_pairs("memory://deem/pairs-*.tar"))[index] for index in range(1))

    assert sorted(map(str, read(example))) == ["3", "a caption of it"]


def test_pictures_alone_are_those_of_a_folder_and_of_its_tar_files(tmp_path, load):
    data = tmp_path / "data"
    (data / "b").mkdir(parents=True)
    (data / "0.png").write_bytes(gray(0))
    (data / "b" / "1.PNG").write_bytes(gray(1))
    (data / "notes.txt").write_text("no picture")
    write_tar(
        data / "c.tar", {"2.png": gray(2), "2.txt": "its caption", "2.json": "{}", "._3.png": b"\0", "3.PNG": gray(3)}
    )

    examples = load(list_pictures(data))

    def numbers(examples):
        return [examples[index]["image"].getpixel((0, 0))[0] // 50 for index in range(len(examples))]

    assert numbers(examples) == [0, 1, 2, 3]
    assert numbers(load(list_pictures(f"{data}/*.tar"))) == numbers(load(list_pictures(data / "c.tar"))) == [2, 3]
    seeds = {examples[index]["seed"] for index in range(8)}
    assert len(seeds) == 8 and examples[5]["seed"] == examples[5]["seed"]
    (data / "b" / "4.png").write_bytes(gray(4))
    assert numbers(load(list_pictures(data))) == [0, 1, 4, 2, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are text")
def test_a_picture_whose_name_is_no_text_is_named(tmp_path, load):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / os.fsdecode(b"\xe9.png")).write_bytes(gray(0))

    with pytest.raises(ValueError, match="(?s)1 of 1 samples of .*'sample 0 of .* surrogates not allowed"):
        load(list_pictures(tmp_path / "data"))


def test_a_missing_or_empty_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist. Set `data.path`"):
        list_pictures(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no picture. Expected files ending in .jpg"):
        list_pictures(tmp_path)


def test_the_collator_takes_documents_of_shards(tmp_path, load):
    _, processor = tiny_deem()
    shard = write_tar(tmp_path / "a.tar", {"0.jpg": jpeg(), "0.txt": "a picture of a scene"})

    batch = DocumentCollator(processor)([load(list_pairs(shard))[0]])

    assert len(batch["pixel_values"]) == 1 and "a picture of a scene" in processor.tokenizer.decode(
        batch["input_ids"][0]
    )
