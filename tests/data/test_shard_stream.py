"""The stream of a training run: without end, dealt out, and resumed to the document."""

from collections import Counter

import pytest
from torch.utils.data import DataLoader

from deem_plugin.data.shard_stream import ShardStream
from deem_plugin.data.shards import list_shards, pairs_reader

from .test_shards import jpeg, write_tar


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two sources of eight shards with three to six captioned pictures each; every fifth caption is too short."""
    folder = tmp_path_factory.mktemp("shards")
    picture = jpeg()
    for name in ("a", "b"):
        for shard in range(8):
            files = {}
            for number in range(3 + shard % 4):
                key = f"{shard}{number:03}"
                files |= {f"{key}.jpg": picture, f"{key}.txt": "short" if number == 4 else f"{name} caption {key}"}
            write_tar(folder / f"{name}-{shard}.tar", files)
    return [list_shards(str(folder / f"{name}-*.tar")) for name in ("a", "b")]


def open_stream(shards, **options):
    return ShardStream([(pairs_reader(), each) for each in shards], [2, 1][: len(shards)], **options)


def caption(document):
    return next(part["text"] for part in document["parts"] if part["text"])


def loader(stream, workers):
    """Batches of three documents as their captions, each with the place behind its last one."""

    def collate(examples):
        return [caption(document) for document, _ in examples], examples[-1][1]

    return iter(DataLoader(stream, batch_size=3, collate_fn=collate, num_workers=workers))


@pytest.mark.parametrize(("workers", "used"), [(0, 4), (0, 23), (1, 5), (3, 4), (3, 23)])
def test_a_resumed_stream_goes_on_as_if_it_had_not_stopped(shards, tmp_path, workers, used):
    """Whosever turn it was, and however far the workers had read ahead; 23 batches are more than all documents."""
    stream = open_stream(shards, seed=5, workers=workers)
    batches = loader(stream, workers)
    for _ in range(used):
        _, place = next(batches)
        stream.note(place)
    stream.save(tmp_path)
    expected = [next(batches)[0] for _ in range(12)]

    resumed = open_stream(shards, seed=5, workers=workers)
    resumed.load(tmp_path)

    again = loader(resumed, workers)
    assert [next(again)[0] for _ in range(12)] == expected


def test_a_stream_resumed_twice_still_goes_on(shards, tmp_path):
    """With workers that have not come to their turn since the first time."""
    whole = loader(open_stream(shards, workers=3), 3)
    expected = [next(whole)[0] for _ in range(9)]
    found = []
    for part in range(3):
        stream = open_stream(shards, workers=3)
        if part:
            stream.load(tmp_path)
        batches = loader(stream, 3)
        for _ in range(2):
            captions, place = next(batches)
            stream.note(place)
            found.append(captions)
        stream.save(tmp_path)

    assert found == expected[:6]


def test_only_shards_that_were_begun_are_read_again(shards, tmp_path):
    stream = open_stream(shards[:1])
    documents = iter(stream)
    for _ in range(20):
        stream.note(next(documents)[1])
    stream.save(tmp_path)
    resumed = open_stream(shards[:1])
    resumed.load(tmp_path)

    next(iter(resumed))

    before, after = (each.sources[0][0].drops["samples"] for each in (stream, resumed))
    assert before > 20 and after <= 6


def test_every_document_comes_equally_often_and_to_one_reader_alone(shards):
    readers = {}
    for rank in range(2):
        batches = loader(open_stream(shards[:1], rank=rank, world_size=2, workers=2), 2)
        for _ in range(40):
            captions, place = next(batches)
            readers.setdefault((rank, place["reader"]), Counter()).update(captions)

    assert len(readers) == 4
    seen = [set(counts) for counts in readers.values()]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 32  # of 36, four of which have a short caption
    assert all(max(counts.values()) - min(counts.values()) <= 1 for counts in readers.values())


def test_sources_come_by_their_weights_and_begin_anew(shards):
    documents = iter(open_stream(shards))

    names = Counter(caption(next(documents)[0])[0] for _ in range(1200))

    assert 0.6 < names["a"] / 1200 < 0.73


def test_readers_draw_for_themselves_and_by_the_seed(shards):
    def order(**options):
        documents = iter(open_stream(shards, **options))
        return [caption(next(documents)[0])[0] for _ in range(40)]

    assert order() == order()
    assert order() != order(seed=1) and order(world_size=2) != order(world_size=2, rank=1)


def test_what_cannot_go_on_is_refused(shards, tmp_path):
    stream = open_stream(shards, workers=2)
    stream.save(tmp_path)

    with pytest.raises(ValueError, match=r"its weights and workers were \[\[2, 1\], 2\] and are \[\[2\], 1\]"):
        ShardStream([(pairs_reader(), shards[0] + shards[1])], [2], workers=1).load(tmp_path)
    with pytest.raises(ValueError, match="its shards were .*16 of hash .* and are .*16 of hash"):
        open_stream(shards[::-1], workers=2).load(tmp_path)
    with pytest.raises(ValueError, match="stream-1.json is missing"):
        open_stream(shards, rank=1, world_size=2).load(tmp_path)


def test_what_cannot_be_dealt_out_or_gives_nothing_is_refused(shards):
    with pytest.raises(
        ValueError, match="8 shards, the first .*a-0.tar, cannot be dealt out to 3 processes with 3 wor"
    ):
        open_stream(shards, world_size=3, workers=3)
    with pytest.raises(ValueError, match=r"weights \[2, 0\] for 1 sources"):
        ShardStream([(pairs_reader(), shards[0])], [2, 0])
    strict = ShardStream([(pairs_reader(min_characters=99), shards[0])], [1])
    with pytest.raises(ValueError, match=r"None of 8 shards, .* holds a document .*'short caption': 36"):
        next(iter(strict))
