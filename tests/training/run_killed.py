"""
Kills a run of a recipe again and again and resumes it, until it ends:
`python -m tests.training.run_killed FOLDER KILLS RANKS [overrides]`. All ranks are killed at once, as by a power cut.

A process of its own, which does nothing but import before it forks: each attempt costs no import, and no thread of a
test is lost in the fork.
"""

import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import deem_plugin.data.collator
import deem_plugin.feedback.factory
import deem_plugin.training.data
import deem_plugin.training.model
import deem_plugin.training.trainer  # noqa: F401  # what `train` imports when it is called
from deem_plugin.training.recipes import load_recipe
from deem_plugin.training.run import train

from .run_ranks import shard_on_cpus


def start(overrides, ranks):
    """Forks processes that train, one a rank; returns their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(ranks):
        if child := os.fork():
            children.append(child)
            continue
        try:
            if ranks > 1:
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
                os.environ |= {name: str(value) for name, value in names.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
                shard_on_cpus()
            train(load_recipe("tiny-tune", overrides))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return children


def all_ended(children):
    """Tells whether all processes have ended; raises if one of them failed."""
    for child in list(children):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            children.remove(child)
            assert status == 0, f"the run ended with status {status}"
    return not children


def in_a_save(folder):
    """Tells whether a checkpoint or the final folder is being written."""
    return (folder / "final.partial").exists() or any(
        not (path / "manifest.json").exists() for path in folder.glob("checkpoint-*")
    )


def main(folder, kills, ranks, overrides):
    """Every second kill comes in the middle of a save, the others at random moments."""
    draw = random.Random(0)
    folder.mkdir()
    killed = during = attempts = 0
    while True:
        attempts += 1
        assert attempts <= 4 * kills + 1
        children = start(overrides, ranks)
        begun, patience = time.monotonic(), draw.uniform(0.5, 3.0) * ranks
        while not (ended := all_ended(children)):
            saving = in_a_save(folder)
            if killed < kills and (saving if killed % 2 else time.monotonic() - begun > patience):
                for child in children:
                    os.kill(child, signal.SIGKILL)
                for child in children:
                    os.waitpid(child, 0)
                killed, during = killed + 1, during + in_a_save(folder)
                break
            time.sleep(draw.uniform(0, 0.003))
        if ended:
            if killed >= kills:
                break
            # It was done before it could be killed: once more from the beginning.
            for path in (*folder.glob("checkpoint-*"), folder / "final"):
                shutil.rmtree(path, ignore_errors=True)
    assert killed == kills and during >= kills // 4, (killed, during)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
