"""What a training run reads of shards: documents without end, of several sources, resumable to the document."""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from deem_plugin.data.shards import ShardReader

Place = dict[str, Any]


class ShardStream(IterableDataset):
    """
    Yields documents of shards, each with the place where the stream stands behind it.

    Sources are mixed at random by their weights, and each begins anew when it ends. Shards are dealt out to processes
    and workers, each of which draws for itself. A stream that goes on from its places (`load`) yields what it would
    have yielded, and reads only the shards that were begun.

    Args:
        sources (`Sequence[tuple[ShardReader, list[str]]]`): Readers with their shards.
        weights (`Sequence[float]`): How often each source comes.
        seed (`int`): Of the mixture.
        rank, world_size (`int`): Of this process, among how many.
        workers (`int`): Workers that will read: `num_workers` of the `DataLoader`.

    Raises:
        ValueError: If a source has fewer shards than there are readers, or a weight is not above 0.
    """

    def __init__(
        self,
        sources: Sequence[tuple[ShardReader, list[str]]],
        weights: Sequence[float],
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
    ):
        if len(weights) != len(sources) or any(weight <= 0 for weight in weights):
            raise ValueError(
                f"Got the weights {list(weights)} for {len(sources)} sources; expected one above 0 for each."
            )
        self.sources, self.weights, self.seed = list(sources), list(weights), seed
        self.rank, self.world_size, self.workers = rank, world_size, max(workers, 1)
        for _, shards in self.sources:
            if len(shards) < world_size * self.workers:
                raise ValueError(
                    f"{len(shards)} shards, the first {shards[0]}, cannot be dealt out to {world_size} processes with "
                    f"{self.workers} workers each. Lower `training.dataloader_num_workers`, or cut them into more."
                )
        self._places: dict[int, Place] = {}  # by reader, the latest that was noted
        self._next = 0  # the reader whose turn it is

    def __iter__(self) -> Iterator[tuple[dict[str, Any], Place]]:
        worker = get_worker_info()
        # The first worker's turn comes first, so it goes on as the reader whose turn it was.
        reader = (self._next + (0 if worker is None else worker.id)) % self.workers
        rng = random.Random(f"{self.seed}|{self.rank}|{reader}")
        place = self._places.get(reader, {"draws": 0, "read": [[0, 0]] * len(self.sources)})
        draws, read = place["draws"], [list(each) for each in place["read"]]
        for _ in range(draws):
            self._choose(rng)
        documents = [self._documents(source, reader, *read[source]) for source in range(len(self.sources))]
        while True:
            source = self._choose(rng)
            document, read[source] = next(documents[source])
            draws += 1
            yield document, {"reader": reader, "draws": draws, "read": [list(each) for each in read]}

    def _choose(self, rng: random.Random) -> int:
        return rng.choices(range(len(self.sources)), self.weights)[0]

    def _documents(self, source: int, reader: int, begun: int, taken: int) -> Iterator[tuple[dict, list[int]]]:
        """Yields a source's documents over and over, behind `taken` ones of the `begun`-th shard that it opens."""
        reads, shards = self.sources[source]
        own = shards[self.rank * self.workers + reader :: self.world_size * self.workers]
        fruitless = 0
        while True:
            for document in islice(reads.read([own[begun % len(own)]]), taken, None):
                taken += 1
                yield document, [begun, taken]
            fruitless = 0 if taken else fruitless + 1
            if fruitless == len(own):
                raise ValueError(
                    f"None of {len(own)} shards, the first {own[0]}, holds a document that the rules of the data let "
                    f"through: {dict(reads.drops)}."
                )
            begun, taken = begun + 1, 0

    def note(self, place: Place) -> None:
        """Remembers the place behind a document that was used."""
        self._places[place["reader"]] = place
        self._next = (place["reader"] + 1) % self.workers

    def save(self, folder: str | Path) -> None:
        """Writes the noted places of this process to `folder`."""
        state = {"layout": self._layout(), "places": list(self._places.values()), "next": self._next}
        (Path(folder) / self._file).write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: str | Path) -> None:
        """
        Goes on from what `save` wrote.

        Raises:
            ValueError: If nothing was written there, or by a stream of other shards, weights, processes or workers.
        """
        file = Path(folder) / self._file
        if not file.is_file():
            raise ValueError(f"{file} is missing, which says where the stream of shards stood. Resume from another.")
        state = json.loads(file.read_text(encoding="utf-8"))
        layout = self._layout()
        if changed := [name for name, value in layout.items() if state["layout"].get(name) != value]:
            raise ValueError(
                f"The stream of {folder} cannot go on: its {' and '.join(changed)} were "
                f"{[state['layout'].get(name) for name in changed]} and are {[layout[name] for name in changed]}. "
                f"Resume with what the run was started with."
            )
        self._places = {place["reader"]: place for place in state["places"]}
        self._next = state["next"]

    @property
    def _file(self) -> str:
        return f"stream-{self.rank}.json"

    def _layout(self) -> dict[str, Any]:
        names = "\n".join(Path(shard).name for _, shards in self.sources for shard in shards)
        shards = f"{names.count(chr(10)) + 1} of hash {hashlib.sha256(names.encode()).hexdigest()[:12]}"
        return {
            "shards": shards,
            "weights": self.weights,
            "seed": self.seed,
            "processes": self.world_size,
            "workers": self.workers,
        }
