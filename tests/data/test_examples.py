"""What a run reads: every document once an epoch, in an order of its own, whoever reads it; and again after a stop."""

import itertools
import pickle
from collections import Counter

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader

from deem_plugin.data.collator import ConversationCollator
from deem_plugin.data.document_collator import DocumentCollator
from deem_plugin.data.examples import CountSkipped, EpochSampler, Examples
from deem_plugin.data.image_collator import ImageCollator
from deem_plugin.data.shards import list_pairs
from deem_plugin.data.tables import BrokenSample

from ..models.tiny_deem import tiny_deem
from ..tiny import tiny_processor
from .shard_files import jpeg, write_tar

BATCH = 2


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def write_pairs(folder, shards, broken=()):
    """Writes shards of three to six captioned pictures; every fifth caption is short, the `broken` are cut off."""
    for shard in range(shards):
        files = {}
        for number in range(3 + shard % 4):
            key = f"{shard}{number:03}"
            picture = jpeg()[:60] if key in broken else jpeg()
            files |= {f"{key}.jpg": picture, f"{key}.txt": "short" if number == 4 else f"the caption {key}"}
        write_tar(folder / f"{shard}.tar", files)
    return str(folder / "*.tar")


def caption(example):
    return next(part["text"] for part in example["parts"] if part["text"])


def captions(examples):
    """Stands for a collator; at the top of a module, as processes that are spawned need it."""
    return {"captions": [caption(example) for example in examples]}


def read(examples, ranks=1, workers=0, steps=None, first=0, **options):
    """
    Reads steps of all ranks, as the Trainer's loaders do.

    Returns:
        `tuple[list, Counter]`: Captions of each step in order, and what was skipped.
    """
    seen, skipped = [], Counter()
    sampler = EpochSampler(len(examples), BATCH * ranks, seed=3)
    batches = [[] for _ in range(ranks)]
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        for rank, own in enumerate(batches):
            own += BatchSamplerShard(BatchSampler(sampler, BATCH, drop_last=False), ranks, rank)
        if len(batches[0]) >= steps:
            break
    for rank in range(ranks):
        loader = DataLoader(
            examples,
            batch_sampler=batches[rank][first:steps],
            collate_fn=CountSkipped(captions),
            num_workers=workers,
            **options,
        )
        for step, batch in enumerate(loader):
            skipped.update(batch["skipped"])
            seen.append((step, rank, batch["captions"]))
    return [captions for _, _, captions in sorted(seen)], skipped


@pytest.mark.parametrize("shards", [3, 7])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_document_comes_once_an_epoch_in_another_order(tmp_path, shards, ranks):
    examples = Examples.of([list_pairs(write_pairs(tmp_path, shards))], cache_dir=tmp_path / "cache")
    count = len(examples)
    assert count == sum(min(3 + shard % 4, 4) + (shard % 4 == 3) for shard in range(shards))

    steps, _ = read(examples, ranks, steps=-(-2 * count // (BATCH * ranks)))

    order = [caption for batch in steps for caption in batch]
    first, second = order[:count], order[count : 2 * count]
    assert len(set(first)) == count and sorted(first) == sorted(second)
    assert first != second and first != sorted(first)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (2, 2), (4, 0), slow(4, 2)])
def test_neither_workers_nor_a_stop_change_the_order_or_what_is_skipped(tmp_path, ranks, workers):
    """In the middle of an epoch and with broken pictures, for two epochs."""
    shards = write_pairs(tmp_path, 3, broken=("0001", "2000"))
    examples = Examples.of([list_pairs(shards)], "skip", cache_dir=tmp_path / "cache", seed=1)
    steps = -(-2 * len(examples) // (BATCH * ranks))

    expected, skipped = read(examples, ranks, steps=steps)
    stopped, before = read(examples, ranks, workers, steps=2)
    resumed, after = read(examples, ranks, workers, steps=steps, first=2)

    assert stopped + resumed == expected and before + after == skipped
    assert skipped["unreadable image"] >= 4


@pytest.mark.slow
@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_workers_may_be_started_anew(tmp_path, context):
    """As on macOS and Windows: all that they need is pickled."""
    examples = Examples.of([list_pairs(write_pairs(tmp_path, 3))], "skip", cache_dir=tmp_path / "cache")

    expected, _ = read(examples, steps=3)

    assert read(examples, steps=3, workers=1, multiprocessing_context=context)[0] == expected


def listed(count, name):
    """A table of texts with its `open`."""
    return [{"text": f"{name}{index}"} for index in range(count)], lambda row, rng: row | {"coin": rng.random()}


def test_sources_come_by_their_weights_and_their_samples_equally_often():
    """Two of a for one of b, of which there are more than are needed for a to come once."""
    examples = Examples([listed(3, "a"), listed(4, "b")], weights=[2, 1])

    epoch = len(examples)
    seen = [examples[index]["text"] for index in range(epoch * 3)]

    assert epoch == 8 + 4 and Counter(text[0] for text in seen[:epoch]) == {"a": 8, "b": 4}
    counts = Counter(seen)
    assert counts == {f"a{index}": 8 for index in range(3)} | {f"b{index}": 3 for index in range(4)}
    with pytest.raises(ValueError, match=r"weights \[1\] for 2 sources; expected one above 0"):
        Examples([listed(3, "a"), listed(4, "b")], weights=[1])


def test_coins_are_drawn_anew_each_epoch_and_by_the_seed():
    examples, other = (Examples([listed(5, "a")], seed=seed) for seed in (0, 1))

    coins = [examples[index]["coin"] for index in range(10)]

    assert len(set(coins)) == 10 and coins == [examples[index]["coin"] for index in range(10)]
    assert coins != [other[index]["coin"] for index in range(10)]


def test_a_sample_that_cannot_be_opened_is_refused_or_the_next_stands_in():
    def open_even(row, rng):
        if int(row["text"][1:]) % 2:
            raise BrokenSample("odd", f"{row['text']} is odd")
        return row

    sources = [(listed(3, "a")[0], open_even)]

    examples = Examples(sources, on_error="skip")
    assert [(examples[index]["text"], examples[index]["skipped"]) for index in (1, 2, 4)] == [
        ("a2", {"odd": 1}),
        ("a2", {}),
        ("a2", {"odd": 1}),
    ]
    with pytest.raises(BrokenSample, match="a1 is odd"):
        Examples(sources)[1]
    with pytest.raises(ValueError, match="`on_error` is 'ignore'; expected one of raise, skip"):
        Examples(sources, on_error="ignore")


def test_the_collators_travel_to_workers():
    processor = tiny_processor()
    for collate in (
        ConversationCollator(processor),
        DocumentCollator(tiny_deem()[1]),
        ImageCollator(processor.image_processor, crop_area=0.9),
    ):
        assert type(pickle.loads(pickle.dumps(CountSkipped(collate))).collate) is type(collate)
