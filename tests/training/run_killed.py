"""
Kills a run of a recipe again and again and resumes it, until it ends:
`python -m tests.training.run_killed FOLDER KILLS [overrides]`.

A process of its own, which does nothing but import before it forks: each attempt costs no import, and no thread of a
test is lost in the fork.
"""

import os
import random
import shutil
import signal
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


def start(overrides):
    """Forks a process that trains; returns its id."""
    if child := os.fork():
        return child
    try:
        train(load_recipe("tiny-tune", overrides))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def in_a_save(folder):
    """Tells whether a checkpoint or the final folder is being written."""
    return (folder / "final.partial").exists() or any(
        not (path / "manifest.json").exists() for path in folder.glob("checkpoint-*")
    )


def main(folder, kills, overrides):
    """Every second kill comes in the middle of a save, the others at random moments."""
    draw = random.Random(0)
    folder.mkdir()
    killed = during = attempts = 0
    while True:
        attempts += 1
        assert attempts <= 4 * kills + 1
        child = start(overrides)
        begun, patience = time.monotonic(), draw.uniform(0.5, 3.0)
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            saving = in_a_save(folder)
            if killed < kills and (saving if killed % 2 else time.monotonic() - begun > patience):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                killed, during = killed + 1, during + in_a_save(folder)
                break
            time.sleep(draw.uniform(0, 0.003))
        if ended:
            assert status == 0, f"the run ended with status {status}"
            if killed >= kills:
                break
            # It was done before it could be killed: once more from the beginning.
            for path in (*folder.glob("checkpoint-*"), folder / "final"):
                shutil.rmtree(path, ignore_errors=True)
    assert killed == kills and during >= kills // 4, (killed, during)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
