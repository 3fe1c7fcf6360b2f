import io
import json
import logging
import tarfile

import pytest
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

from deem_plugin.data.document_collator import DocumentCollator
from deem_plugin.data.shards import list_shards, mix_streams, stream_interleaved, stream_pairs

from ..models.tiny_deem import tiny_deem
from ..tiny import tiny_image


def jpeg(seed=0):
    buffer = io.BytesIO()
    tiny_image(seed, (8, 6)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return str(path)


def web_document(key, texts, images):
    """The files of an MMC4 document; `images` are (name, text index, similarity, bytes)."""
    info = [{"image_name": n, "matched_text_index": i, "matched_sim": s} for n, i, s, _ in images]
    files = {f"{key}.json": json.dumps({"text_list": texts, "image_info": info})}
    return files | {f"{key}.{name}": data for name, _, _, data in images if data is not None}


@pytest.fixture
def pairs(tmp_path):
    """Four shards of five pictures with captions each."""
    for shard in range(4):
        files = {}
        for number in range(5):
            key = f"{shard}{number:03}"
            files |= {f"{key}.jpg": jpeg(), f"{key}.txt": f"picture {key} of a scene"}
        write_tar(tmp_path / f"pairs-{shard}.tar", files)
    return str(tmp_path / "pairs-*.tar")


def read(parts):
    """Parts in short: the text, or the last name of the picture."""
    return [part["text"] or part["image"]["path"].rsplit(".", 2)[-2] for part in parts]


def texts(documents):
    return [part["text"] for document in documents for part in document["parts"] if part["text"]]


def test_pictures_stand_beside_their_texts_and_in_front_or_behind_by_the_seed(tmp_path):
    images = [("a.jpg", 0, 0.3, jpeg(0)), ("b.jpg", 2, 0.3, jpeg(1))]
    shard = write_tar(tmp_path / "a.tar", web_document("0", ["one ", "two", "three"], images))

    seen = {tuple(read(next(iter(stream_interleaved(shard, seed=seed)[0]))["parts"])) for seed in range(30)}

    assert seen == {
        ("a", "one two", "b", "three"),
        ("a", "one two three", "b"),
        ("one", "a", "two", "b", "three"),
        ("one", "a", "two three", "b"),
    }


def test_a_document_is_the_same_whenever_it_is_read(pairs):
    first, again = (list(stream_pairs(pairs, seed=5)[0]) for _ in range(2))

    assert first == again
    assert first != list(stream_pairs(pairs, seed=6)[0])


def test_pictures_keep_their_bytes_and_their_name(tmp_path):
    shard = write_tar(tmp_path / "a.tar", {"0.png": b"anything", "0.json": '{"caption": "a long caption"}'})

    (document,) = stream_pairs(shard)[0]

    (image,) = (part["image"] for part in document["parts"] if part["image"])
    assert image == {"path": f"{shard}::0.png", "bytes": b"anything"}
    assert document["learn_from"] == 0


def test_half_of_the_pictures_stand_in_front_and_half_of_the_single_ones_stay(tmp_path):
    files = {}
    for key in range(400):
        files |= web_document(f"{key:04}", ["a text"], [("a.jpg", 0, 0.3, b"")])
    shard = write_tar(tmp_path / "a.tar", files)

    stream, drops = stream_interleaved(shard)
    documents = list(stream)

    assert 160 < len(documents) < 240
    assert drops == {"samples": 400, "document with one image": 400 - len(documents)}
    front = sum(document["parts"][0]["text"] is None for document in documents)
    assert 0.35 < front / len(documents) < 0.65


def test_every_reason_is_counted_for_interleaved_documents(tmp_path, caplog):
    good = ("a.jpg", 0, 0.3, jpeg())
    files = (
        web_document("0", ["many"], [(f"{i}.jpg", 0, 0.3, jpeg()) for i in range(8)])
        | web_document("1", ["unlike"], [("a.jpg", 0, 0.23, jpeg())])
        | web_document("2", ["none"], [])
        | web_document("3", ["see <image>"], [good])
        | web_document("4", ["broken"], [("c.jpg", 0, 0.3, jpeg()[:60]), ("b.jpg", 0, 0.3, None), good])
        | web_document("5", ["far"], [("a.jpg", 1, 0.3, jpeg())])
        | {"6.json": "{"}
        | {"7.json": json.dumps({"text_list": ["a"], "image_info": [{"image_name": "a.jpg"}]})}
    )
    shard = write_tar(tmp_path / "a.tar", files)

    stream, drops = stream_interleaved(shard, keep_single=1.0, on_error="skip")
    with caplog.at_level(logging.INFO, logger="deem_plugin"):
        documents = list(stream)

    assert [sum(part["image"] is not None for part in document["parts"]) for document in documents] == [6, 1]
    assert drops == {
        "samples": 8,
        "image beyond the most": 2,
        "image unlike its text": 1,
        "document without image": 2,
        "mark within the text": 1,
        "unreadable image": 1,
        "missing image": 1,
        "broken sample": 3,
    }
    assert "so far: {'samples': 8" in caplog.text


def test_every_reason_is_counted_for_pairs(tmp_path):
    files = {"0.jpg": jpeg(), "0.txt": " too short "} | {"1.jpg": jpeg()[:60], "1.txt": "a damaged picture"}
    files |= {"2.txt": "no picture at all"} | {"3.jpg": jpeg(), "3.txt": "an <image> of it"} | {"4.jpg": jpeg()}
    stream, drops = stream_pairs(write_tar(tmp_path / "a.tar", files), on_error="skip")

    assert list(stream) == []
    assert drops == {
        "samples": 5,
        "short caption": 1,
        "unreadable image": 1,
        "document without image": 1,
        "broken sample": 2,
        "mark within the text": 1,
    }


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (web_document("0", ["a"], [("a.jpg", 0, 0.3, None)]), r"image .*a.tar::0.a.jpg is not in its shard"),
        (web_document("0", ["a"], [("a.jpg", 3, 0.3, b"")]), "belongs to text 3 of 1"),
        ({"0.json": "[]"}, "JSON of the sample .*::0 lacks one of text_list, image_info"),
        ({"0.jpg": b""}, r"with the files \['jpg'\] has no readable .json"),
    ],
)
def test_what_is_broken_raises_by_default(tmp_path, files, message):
    stream, _ = stream_interleaved(write_tar(tmp_path / "a.tar", files))

    with pytest.raises(ValueError, match=message):
        list(stream)


def test_a_shard_that_is_cut_off_is_named_even_when_skipping(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"0.jpg": bytes(5000), "0.txt": "a long caption"})
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:3000])

    with pytest.raises(ValueError, match="a.tar is damaged or cut off"):
        list(stream_pairs(path, on_error="skip")[0])


@pytest.mark.parametrize("taken", [1, 5, 7, 20])
def test_a_resumed_stream_goes_on_where_it_was(pairs, taken):
    expected = list(stream_pairs(pairs)[0])
    stream = stream_pairs(pairs)[0]
    for _, _ in zip(range(taken), stream, strict=False):
        state = stream.state_dict()

    resumed = stream_pairs(pairs)[0]
    resumed.load_state_dict(state)

    assert list(resumed) == expected[taken:]


def test_two_ranks_see_disjoint_halves(pairs):
    halves = [set(texts(split_dataset_by_node(stream_pairs(pairs)[0], rank, 2))) for rank in range(2)]

    assert [len(half) for half in halves] == [10, 10]
    assert halves[0] | halves[1] == set(texts(stream_pairs(pairs)[0]))


def test_workers_share_the_shards(pairs):
    loader = DataLoader(stream_pairs(pairs)[0], batch_size=None, num_workers=2)

    assert sorted(texts(loader)) == sorted(texts(stream_pairs(pairs)[0]))


def test_two_sources_are_mixed_two_to_one_and_a_mixture_resumes(tmp_path):
    for name in ("a", "b"):
        files = {}
        for key in range(300):
            files |= {f"{key:03}.jpg": b"", f"{key:03}.txt": f"{name} caption {key}"}
        write_tar(tmp_path / f"{name}.tar", files)

    def mixture():
        streams = [stream_pairs(str(tmp_path / f"{name}.tar"))[0] for name in ("a", "b")]
        return mix_streams(streams, (2, 1), seed=1)

    expected = texts(mixture())
    assert 0.6 < sum(text.startswith("a") for text in expected) / len(expected) < 0.73

    stream = mixture()
    for _, _ in zip(range(50), stream, strict=False):
        state = stream.state_dict()
    resumed = mixture()
    resumed.load_state_dict(state)
    assert texts(resumed) == expected[50:]


def test_counts_of_a_mixed_stream_arrive(pairs):
    (one, drops), (two, _) = stream_pairs(pairs), stream_pairs(pairs, seed=1)

    list(mix_streams([one, two], (1, 1)))

    assert drops["samples"] > 0


def test_globs_are_sorted_and_addresses_stay_addresses(tmp_path, pairs):
    assert list_shards(pairs) == [str(tmp_path / f"pairs-{number}.tar") for number in range(4)]
    assert list_shards(["memory://x/a.tar"]) == ["memory://x/a.tar"]
    with pytest.raises(ValueError, match="No shard is found at .*none-"):
        list_shards(str(tmp_path / "none-*.tar"))


def test_shards_behind_an_address_are_streamed(pairs):
    import fsspec

    remote = fsspec.filesystem("memory")
    with open(list_shards(pairs)[0], "rb") as file:
        remote.pipe("/deem/pairs-0.tar", file.read())

    assert len(texts(stream_pairs("memory://deem/pairs-*.tar")[0])) == 5


def test_wrong_settings_are_named(pairs):
    with pytest.raises(ValueError, match="`on_error` is 'ignore'; expected one of raise, skip"):
        stream_pairs(pairs, on_error="ignore")
    with pytest.raises(ValueError, match=r"weights \[2, 0\] for 1 streams"):
        mix_streams([stream_pairs(pairs)[0]], (2, 0))


def test_the_collator_takes_documents_of_shards_as_they_come(pairs):
    _, processor = tiny_deem()

    batch = DocumentCollator(processor)(list(stream_pairs(pairs)[0].take(3)))

    assert len(batch["pixel_values"]) == 3
    assert (batch["input_ids"] == processor.image_token_id).sum() == 3 * processor.num_image_tokens


def test_a_damaged_picture_raises_by_its_name_when_it_is_opened(tmp_path):
    _, processor = tiny_deem()
    shard = write_tar(tmp_path / "a.tar", {"7.jpg": jpeg()[:60], "7.txt": "a damaged picture"})

    with pytest.raises(ValueError, match=r"a.tar::7.jpg cannot be read"):
        DocumentCollator(processor)(list(stream_pairs(shard)[0]))
