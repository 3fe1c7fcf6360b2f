"""Faults of data: records, files, pictures, shards, regions."""

import io
import json
import os
import struct
import tarfile
import zlib

import numpy as np
from PIL import Image

from ..tiny import tiny_image
from .rows import ANSWER, Row, record, turns

GOOD = [record(id=number) for number in range(4)]
TEXT = json.dumps(GOOD)
LINES = "\n".join(map(json.dumps, GOOD))
WRONG = r"^deem data: .*record 4 of .*data\.json"
# Behind each other: a fault of one record is told with the number of all, and on a line of its own.
PROBLEM = r"record 4 of \S*data\.json"


def of_file(name, content, says, code=1, suffix="json", lines=2):
    """A file of conversations."""
    return Row(name, lambda place: _checked(place, content, suffix), says, code, lines=lines)


def _checked(place, content, suffix):
    return place.check(place.file(f"data.{suffix}", content))


def of_record(name, bad, says, code=1):
    """A record behind four good ones."""
    return of_file(name, [*GOOD, bad], f"{PROBLEM}.*{says}", code)


def chat(*contents):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}


RECORDS = [
    of_record("missing conversations", record(conversations=...), "expected `conversations`"),
    of_record("conversations are a text", record(conversations="hello"), "not as expected"),
    of_record("conversations are null", record(conversations=None), "expected `conversations`"),
    of_record("a turn is a text", record(conversations=["hi", "ho"]), "not as expected"),
    of_record("a turn is null", record(conversations=[None, None]), "not as expected"),
    of_record("a value is a number", record(conversations=[*turns("<image>"), {"from": "gpt", "value": 3}]), "3"),
    of_record("a value is missing", record(conversations=[*turns("<image>"), {"from": "gpt"}]), "content"),
    of_record("a speaker is a list", record(conversations=[{"from": ["human"], "value": "a"}, ANSWER]), "speaker"),
    of_record("an unknown speaker", record(conversations=[{"from": "bot", "value": "a"}, ANSWER]), "'bot'"),
    of_record("a part is a text", chat(["hi"], "a"), "part"),
    of_record("a part without text", chat([{"type": "text"}], "a"), "part"),
    of_record("an image is a number", record(image=5), "5"),
    of_record("an image is a dictionary", record(image={"path": "1.png"}), "path"),
    of_record("images are numbers", record(image=[5]), "5"),
    of_record("an image is true", record(image=True), "True"),
    of_record("more marks than images", record(conversations=turns("<image><image>", "a")), "2 <image> mark"),
    of_record("fewer marks than images", record(conversations=turns("a", "b")), "0 <image> mark"),
    of_record("an image with an empty name", record(image=""), "1 <image> mark"),
    of_record("no answer", record(conversations=turns("<image>")), "no answer to learn"),
    of_record("empty answers alone", record(conversations=turns("<image> a", " ")), "no answer to learn"),
    of_record("an empty answer of parts", chat("a", []), "no answer to learn"),
    of_record("no turns", record(conversations=[], image=...), "empty"),
    of_record("two questions in a row", record(conversations=[*turns("<image>"), *turns("b", "c")]), "follow"),
    of_record("a record is a list", [1, 2], r"\[1, 2\]"),
    of_record("a record is null", None, "None"),
    of_record("an image outside", record(image="../outside.png"), "outside.*allow_outside"),
    of_record("an image of the machine", record(image="/etc/hostname"), "/etc/hostname.*outside.*allow_outside"),
    of_record("an address as image", record(image="http://example.com/a.png"), "does not exist"),
    of_record("a picture is missing", record(image="missing.png"), "does not exist"),
    of_record("a folder as image", record(image=".."), "outside"),
    of_record("a null character in a name", record(image="a\0.png"), "a"),
    of_record("a name that is too long", record(image="a" * 5000), "a"),
    of_record("images and image", record(images=["1.png"]), "give one of them"),
    of_record("a video", record(video="a.mp4"), "video"),
]

FILES = [
    of_file("some empty answers", [record(conversations=turns("<image>", "a", "b", "", "c", ""))],
            "2 empty answer", code=0),
    of_file("a huge text", [*GOOD, record(conversations=turns("<image>" + "a" * (20 << 20), "a"))],
            r"sample 4 of .*20 MiB"),
    of_file("an empty array", [], "holds no sample"),
    of_file("an object", {"data": GOOD}, "not a JSON array"),
    of_file("an empty file", "", "not a JSON array"),
    of_file("a file of spaces", "  \n ", "not a JSON array"),
    of_file("half of a surrogate pair", LINES.replace("yes", "\\ud800", 1), "surrogates", suffix="jsonl"),
    of_file("NaN", TEXT.replace('"id": 0', '"id": NaN'), "no valid JSON"),
    of_file("a comma at the end", TEXT[:-1] + ",]", "no valid JSON"),
    of_file("two commas", TEXT[:-1] + ",," + json.dumps(record()) + "]", "no valid JSON behind its first"),
    of_file("a missing comma", json.dumps(GOOD[:2])[:-1] + json.dumps(record()) + "]", "no valid JSON"),
    of_file("cut off in a record", TEXT[:-30], "cut off"),
    of_file("cut off between records", TEXT[:-1], "cut off"),
    of_file("text behind the array", TEXT + " GARBAGE {", "several files in one"),
    of_file("two arrays", TEXT + TEXT, "several files in one"),
    of_file("JSON in Latin-1", TEXT.replace("yes", "\xe9").encode("latin-1"), r"data\.json is no valid JSON"),
    of_file("JSON in UTF-16", TEXT.encode("utf-16"), r"data\.json is not a JSON array"),
    of_file("a byte order mark", b"\xef\xbb\xbf" + TEXT.encode(), "4 of 4 samples", code=0),
    of_file("a picture as JSON", b"\x89PNG\r\n\x1a\n", r"data\.json is not a JSON array"),
    of_file("deep nesting", "[" * 100_000, r"data\.json.*nested"),
    of_file("deep nesting in a record", '[{"a": ' + "[" * 5000 + "]" * 5000 + "}]", r"data\.json.*nested"),
    of_file("huge numbers", TEXT.replace('"id": 0', '"id": 1' + "0" * 5000), "no valid JSON.*integer"),
    of_file("lines", LINES, "4 of 4 samples", code=0, suffix="jsonl"),
    of_file("an array as lines", TEXT, r"record 0 of .*expected an object", suffix="jsonl"),
    of_file("pretty lines", json.dumps(GOOD, indent=1), "Line 1 of .* no valid JSON", suffix="jsonl"),
    of_file("lines in Latin-1", LINES.replace("yes", "\xe9").encode("latin-1"), "Line 1 of", suffix="jsonl"),
    of_file("a huge line", LINES + "\n" + "a" * (80 << 20), "Line 5 of .* MiB", suffix="jsonl"),
    of_file("no lines", "", "holds no sample", suffix="jsonl"),
    of_file("null as a line", "null", "record 0 of .*None", suffix="jsonl"),
    of_file("a deeply nested line", "[" * 100_000, "Line 1 of .* no valid JSON", suffix="jsonl"),
    of_file("a text as parquet", "PAR1", r"data\.parquet", suffix="parquet"),
    of_file("an unknown ending", TEXT, "neither .json, .jsonl nor .parquet", suffix="csv"),
    Row("data are missing", lambda place: place.check("/nowhere.json"), "no data set at /nowhere.json"),
    Row("data are a pipe", lambda place: place.check(_pipe(place.folder / "data.json")), r"data\.json.*regular file"),
    Row("an image folder is missing", lambda place: place.check(place.parts / "data.json", data__image_dir="/nowhere"),
        "/nowhere does not exist"),
    Row("an empty folder as data", lambda place: place.check(place.empty()), "no data set|no .*parquet|holds no"),
]  # fmt: skip


def _pipe(path):
    os.mkfifo(path)
    return path


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, pixels: bytes) -> bytes:
    """A PNG file, whatever its header promises."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def saved(image, form, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


PICTURE = tiny_image(3, (64, 48))
PNG, JPEG = saved(PICTURE, "PNG"), saved(PICTURE, "JPEG")
GREY16 = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype("uint16")
RGB16 = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in GREY16)
PALETTE = PICTURE.convert("P")
FRAMES = [tiny_image(seed) for seed in range(3)]
EXIF = Image.Exif()
EXIF[0x0112] = 6
BAD_EXIF = b"\xff\xd8\xff\xe1\x00\x20Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 7 + JPEG[2:]

BROKEN = {
    "zero.jpg": (b"", "cannot identify"),
    "cut.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "cut.png": (PNG[: len(PNG) // 2], "truncated"),
    "page.jpg": (b"<html>404 not found</html>", "cannot identify"),
    "bomb.png": (png(60_000, 60_000, 8, 2, b"\0" * 1000), "exceeds limit"),
    "half-bomb.png": (png(10_500, 10_500, 8, 2, b"\0" * 1000), "truncated|exceeds limit"),
}
ODD = {
    "cmyk.jpg": saved(PICTURE.convert("CMYK"), "JPEG"),
    "palette.png": saved(PALETTE, "PNG", transparency=0),
    "palette-bytes.png": saved(PALETTE, "PNG", transparency=bytes([0] * 128 + [255] * 128)),
    "rgb16.png": png(64, 48, 16, 2, RGB16),
    "grey16.png": saved(Image.fromarray(GREY16), "PNG"),
    "rgba.png": saved(PICTURE.convert("RGBA"), "PNG"),
    "grey.png": saved(PICTURE.convert("L"), "PNG"),
    "float.tiff": saved(PICTURE.convert("F"), "TIFF"),
    "int32.tiff": saved(PICTURE.convert("I"), "TIFF"),
    "turned.jpg": saved(PICTURE, "JPEG", exif=EXIF),
    "bad-exif.jpg": BAD_EXIF,
    "one.png": saved(PICTURE.resize((1, 1)), "PNG"),
    "thin.png": saved(PICTURE.resize((1, 2000)), "PNG"),
    "long.png": saved(PICTURE.resize((20_000, 1)), "PNG"),
    "moving.gif": saved(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "moving.webp": saved(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]),
}


def trained_on(place, images, **settings):
    """Trains on pictures in a folder of their own, one in each record."""
    data = place.file("data.json", [record(id=number, image=name) for number, name in enumerate(images)])
    return place.train(data__path=data, data__image_dir=place.folder, feedback=None, **settings)


def _odd(place):
    for name, content in ODD.items():
        place.file(name, content)
    return trained_on(place, ODD, training__per_device_train_batch_size=len(ODD))


def _linked(place, target, **settings):
    os.symlink(target(place), place.folder / "link.png")
    return trained_on(place, ["link.png"] * 4, **settings)


PICTURES = [
    *(
        Row(
            f"the picture {name}",
            lambda place, name=name, content=content: trained_on(place, [place.file(name, content).name] * 4),
            f"{name} cannot be read.*{why}",
            slow=name != "cut.jpg",
        )
        for name, (content, why) in BROKEN.items()
    ),
    Row("odd pictures", _odd, "Saved", code=0, slow=True),
    Row("a pipe as picture", lambda place: trained_on(place, [_pipe(place.folder / "a.png").name] * 4),
        "a.png cannot be read.*regular file"),
    Row("a folder as picture", lambda place: trained_on(place, [place.empty().name] * 4), "empty.*does not exist"),
    Row("a link to nowhere", lambda place: _linked(place, lambda _: "/nowhere.png"), "link.png.*outside", lines=5),
    Row("a link to itself", lambda place: _linked(place, lambda _: "link.png"), "link.png.*(cannot be read|loop)"),
    Row("a link outside", lambda place: _linked(place, lambda place: place.parts / "images/1.png"),
        "link.png.*outside.*allow_outside", lines=5),
    Row("a link outside, allowed",
        lambda place: _linked(place, lambda place: place.parts / "images/1.png", data__allow_outside="true"),
        "Saved", code=0, slow=True),
]  # fmt: skip


def document(name, parts, says, code=1):
    """A document behind a good one."""
    good = {"parts": ["a noise", {"image": "1.png"}]}
    content = "\n".join(json.dumps(line) for line in (good, {"parts": parts} if isinstance(parts, list) else parts))
    return Row(name, lambda place: place.check(place.file("data.jsonl", content), data__kind="documents"), says, code)


DOCUMENTS = [
    document("a document is a list", [[]], "document 1 of .*part"),
    document("a document without parts", {"part": []}, "document 1 of .*parts"),
    document("a document of an empty text", [""], "document 1 of .*empty text"),
    document("a document with an unknown key", ["a", {"image": "1.png", "bax": 1}], "document 1 of .*'bax'"),
    document("a document with two regions", ["a", {"image": "1.png", "box": [0, 0, 1, 1], "mask": "1.png"}], "one of"),
    document("a document with half a box", ["a", {"image": "1.png", "box": [0, 0]}], "document 1 of .*box"),
    document("a box of texts", ["a", {"image": "1.png", "box": ["a", "b", "c", "d"]}], "document 1|sample 1"),
    document("a box of NaN", ["a", {"image": "1.png", "box": [float("nan")] * 4}], "document 1 of .*box"),
    document("points that are none", ["a", {"image": "1.png", "points": [1, 2]}], "document 1|sample 1"),
    document("a document's image outside", ["a", {"image": "../x.png"}], "document 1 of .*outside.*allow_outside"),
    document("a document's mask outside", ["a", {"image": "1.png", "mask": "/etc/hostname"}], "outside"),
    document("a document's image is a number", ["a", {"image": 3}], "document 1 of"),
    document("a document learns from beyond", {"parts": ["a"], "learn_from": 3}, "document 1 of .*learn_from=3"),
    document("a document's picture is missing", ["a", {"image": "missing.png"}], "missing.png .*does not exist"),
]

SHARD = {"text_list": ["a b"], "image_info": [{"image_name": "x.png", "matched_text_index": 0, "matched_sim": 0.9}]}


def shard(name, files, says, code=1, kind="interleaved", change=lambda content: content):
    """A shard with one sample."""

    def argv(place):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            for member, content in files.items():
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        path = place.file("a.tar", change(file.getvalue()))
        return place.check(path, data__kind="shards", **{f"data__{kind}": path})

    return Row(name, argv, says, code)


def sample(**fields):
    return {"0.json": SHARD | fields, "0.x.png": PNG}


def _info(**fields):
    return [SHARD["image_info"][0] | fields]


SHARDS = [
    shard("a caption is null", {"0.png": PNG, "0.json": {"caption": None}}, "a.tar::0.*caption", kind="pairs"),
    shard("a caption is a list", {"0.png": PNG, "0.json": {"caption": ["a"]}}, "a.tar::0.*caption", kind="pairs"),
    shard("a caption in Latin-1", {"0.png": PNG, "0.txt": b"\xe9" * 20}, "a.tar::0", kind="pairs"),
    shard("two pictures and a caption", {"0.png": PNG, "0.jpg": PNG, "0.txt": b"a noise of noise"}, "one picture",
          kind="pairs"),
    shard("a text is null", sample(text_list=[None]), "a.tar::0"),
    shard("a list of texts is a text", sample(text_list="abc"), "text_list"),
    shard("no list of images", sample(image_info=None), "a.tar::0"),
    shard("a similarity is null", sample(image_info=_info(matched_sim=None)), "a.tar::0"),
    shard("an index is a text", sample(image_info=_info(matched_text_index="0")), "a.tar::0"),
    shard("an index is beyond", sample(image_info=_info(matched_text_index=5)), "text 5 of 1"),
    shard("a picture is not in the shard", {"0.json": SHARD}, "x.png is not in its shard"),
    shard("a sample of no JSON", {"0.json": b"{", "0.x.png": PNG}, "no readable .json"),
    shard("a shard that is cut off", sample(), "a.tar is damaged", change=lambda content: content[:700]),
    shard("a shard of text", {}, "a.tar is damaged", change=lambda _: b"not a tar" * 100),
    shard("an empty shard", {}, "a.tar", change=lambda _: b""),
    Row("no shard", lambda place: place.check("/nowhere.tar", data__kind="shards", data__pairs="/nowhere.tar"),
        "no shard /nowhere.tar"),
    Row("no shard of a glob", lambda place: place.check("x", data__kind="shards", data__pairs="/nowhere*.tar"),
        "No shard is found"),
]  # fmt: skip

ROWS = [*RECORDS, *FILES, *PICTURES, *DOCUMENTS, *SHARDS]
