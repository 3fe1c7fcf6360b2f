"""What a training run reads: the samples of one or several tables, in another order each epoch."""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, count, islice
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from deem_plugin.data.tables import BrokenSample, Listing, check_on_error

if TYPE_CHECKING:
    import datasets


class Examples(Dataset):
    """
    Opens the samples of tables when they are asked for.

    An index counts over all epochs, `epoch * len(examples) + place`. What is drawn at random for a sample (a crop, on
    which side of its text a picture stands) depends on the seed and the index alone, not on who reads it and when. A
    sample that cannot be opened raises, or is counted and the next one stands in for it.

    Args:
        sources (`Sequence[tuple[datasets.Dataset, Callable]]`): Tables, each with the `open` of its `Listing`.
        weights (`Sequence[float]`, *optional*):
            How often each source comes. In an epoch, all samples of the one that lasts longest come once and those of
            the others again and again, equally often. By default all samples come once.
        seed (`int`): Of all draws.
        on_error (`str`): `raise`, or `skip` and count.

    Raises:
        ValueError: If there is not one weight above 0 for each source.
    """

    def __init__(
        self,
        sources: Sequence[tuple["datasets.Dataset", Callable]],
        weights: Sequence[float] | None = None,
        seed: int = 0,
        on_error: str = "raise",
    ):
        check_on_error(on_error)
        sizes = [len(table) for table, _ in sources]
        if weights is not None and (len(weights) != len(sizes) or any(weight <= 0 for weight in weights)):
            raise ValueError(
                f"Got the weights {list(weights)} for {len(sizes)} sources; expected one above 0 for each."
            )
        longest = 1 if weights is None else max(size / weight for size, weight in zip(sizes, weights, strict=True))
        self.sources, self.seed, self.on_error = list(sources), seed, on_error
        self._counts = sizes if weights is None else [round(weight * longest) for weight in weights]
        self._ends = list(accumulate(self._counts))

    @classmethod
    def of(cls, listings: Sequence[Listing], on_error: str = "raise", cache_dir=None, **options) -> "Examples":
        """Reads listings and returns their samples; `options` as for the class."""
        tables = [(listing.read(on_error, cache_dir), listing.open) for listing in listings]
        return cls(tables, on_error=on_error, **options)

    @property
    def layout(self) -> dict[str, Any]:
        """What the order depends on: the samples of each source in an epoch, and the seed."""
        return {"samples": self._counts, "seed": self.seed}

    def __len__(self) -> int:
        return self._ends[-1]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """
        Opens a sample.

        Returns:
            `dict`: What the source's `open` makes of it, and under `skipped` how many were skipped for it, by reason.

        Raises:
            BrokenSample: With `raise`, if it cannot be opened.
            ValueError: If no sample at all can be.
        """
        epoch, place = divmod(index, len(self))
        skipped: Counter[str] = Counter()
        for at in range(place, place + len(self)):
            try:
                example = self._open(epoch, at % len(self))
            except BrokenSample as error:
                if self.on_error == "raise":
                    raise
                skipped[error.reason] += 1
                continue
            return example | {"skipped": skipped + Counter(example.get("skipped", ()))}
        raise ValueError(
            f"None of {len(self)} samples can be opened: {dict(skipped)}. See them with `on_error: raise`."
        )

    def _open(self, epoch: int, place: int) -> dict[str, Any]:
        source = bisect_right(self._ends, place)
        (table, open_sample), size = self.sources[source], self._counts[source]
        # Where a source does not come a whole number of times in an epoch, the next epoch goes on behind its last.
        row = epoch * size + place - (self._ends[source] - size)
        return open_sample(table[row % len(table)], Random(f"{self.seed}|{epoch}|{place}"))


class EpochSampler(Sampler):
    """
    Yields the indices of `Examples` in another order each epoch, for as many whole batches as hold an epoch.

    Each call goes on where the one before has ended, so that no sample comes twice to fill the last batch.

    Args:
        length (`int`): Of the examples.
        multiple (`int`): Samples of a batch over all processes.
        seed (`int`): Of the order.
    """

    def __init__(self, length: int, multiple: int, seed: int = 0):
        self.length, self.seed, self.epoch = length, seed, 0
        self.samples = math.ceil(length / multiple) * multiple

    def set_epoch(self, epoch: int) -> None:
        """Says which pass of the Trainer comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[int]:
        epoch, begin = divmod(self.epoch * self.samples, self.length)
        return islice(self._indices(epoch), begin, begin + self.samples)

    def _indices(self, first: int) -> Iterator[int]:
        for epoch in count(first):
            order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
            yield from (epoch * self.length + order).tolist()


class CountSkipped:
    """
    Collates examples and adds to the batch what was skipped for them, by reason, under `skipped`.

    Args:
        collate (`Callable`): The collator of the examples. It may count in an attribute `cut` how many lost their end.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.collate = collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collates a batch."""
        skipped = sum((example["skipped"] for example in examples), Counter())
        before = getattr(self.collate, "cut", 0)
        batch = self.collate(examples)
        if cut := getattr(self.collate, "cut", 0) - before:
            skipped["end over max_length"] += cut
        return {**batch, "skipped": dict(skipped)}
