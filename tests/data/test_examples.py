"""What a run reads: every document once an epoch, in an order of its own, whoever reads it; and again after a stop."""

import itertools
from collections import Counter

import pytest
from torch.utils.data import BatchSampler, DataLoader

from deem_plugin.data.examples import CountSkipped, EpochSampler, Examples
from deem_plugin.data.shards import list_pairs

from .shard_files import jpeg, write_tar

BATCH = 2


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
    Reads steps of all ranks, as the Trainer's loaders do: batches go round the ranks.

    Returns:
        `tuple[list, Counter]`: Captions of each step in order, and what was skipped.
    """
    seen, skipped = [], Counter()
    sampler = EpochSampler(len(examples), BATCH * ranks, seed=3)
    batches = []
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        batches += list(BatchSampler(sampler, BATCH, drop_last=False))
        if len(batches) >= steps * ranks:
            break
    for rank in range(ranks):
        own = batches[rank::ranks][first:steps]
        loader = DataLoader(
            examples, batch_sampler=own, collate_fn=CountSkipped(captions), num_workers=workers, **options
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


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (2, 2), (4, 0)])
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
