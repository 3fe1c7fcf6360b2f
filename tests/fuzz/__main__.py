"""
Fuzzes the readers: `python -m tests.fuzz SECONDS [READER ...]`, so many seconds for each, all without a name.

Each gets files that are right with something wrong in them. It may read one or raise what `deem` shows without a
traceback, within seconds and within memory; the first inputs of each other kind of end are kept in `out/fuzz`.
"""

import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random

from deem_plugin.cli import is_for_the_user

from .mutations import spoil
from .readers import READERS

MOST_SECONDS, MOST_MIB = 10, 512  # for one input
KEPT = Path("out/fuzz")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def read(reader, folder: Path, content: bytes) -> str | None:
    """Reads one file, and returns what is wrong with how that went."""
    began, memory = time.process_time(), peak_mib()  # a busy machine is no failure
    try:
        reader.read(folder, content)
    except Exception as error:
        if not is_for_the_user(error):
            frame = traceback.extract_tb(error.__traceback__)[-1]
            ours = [f for f in traceback.extract_tb(error.__traceback__) if "deem_plugin" in f.filename]
            place = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in (frame, *ours[-1:]))
            return f"{type(error).__name__} at {place}: {str(error)[:100]!r}"
    if (seconds := time.process_time() - began) > MOST_SECONDS:
        return f"slow: {seconds:.0f} s"
    if peak_mib() - memory > MOST_MIB:
        return f"large: {peak_mib() - memory:.0f} MiB"
    return None


def fuzz(name: str, seconds: float, seed: int) -> Counter[str]:
    """Fuzzes one reader and prints how often it read what; returns what was wrong, and how often."""
    draw, wrong, count = Random(seed), Counter(), 0
    kept = KEPT / name
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        seeds = READERS[name].seeds(folder)
        for content in seeds[:1]:  # that one is right
            READERS[name].read(folder, content)
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            content = spoil(draw.choice(seeds), draw)
            (kept / "last").write_bytes(content)  # if the interpreter dies of it
            count += 1
            if problem := read(READERS[name], folder, content):
                kind = problem.partition(": ")[0]
                if kind not in wrong:
                    (kept / f"{len(wrong)}").write_bytes(content)
                    say(f"{name}: {problem}; kept in {kept / str(len(wrong))}")
                wrong[kind] += 1
    (kept / "last").unlink(missing_ok=True)
    say(f"{name}: {count} files in {seconds:.0f} s, {wrong.total()} ended otherwise")
    return wrong


def main(seconds: float, names: list[str], seed: int) -> int:
    return 1 if sum(fuzz(name, seconds, seed).total() for name in names or READERS) else 0


if __name__ == "__main__":
    say(f"seed {(seed := time.time_ns() % 2**32)}")
    sys.exit(main(float(sys.argv[1]), sys.argv[2:], seed))
