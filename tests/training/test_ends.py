"""Whatever ends a command, none of the processes that it started is left."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from deem_plugin.evaluation.robustvqa import SPLITS, write_robustvqa

from ..evaluation.helpers import offline_env, robustvqa_rows
from ..tiny import tiny_llava
from .helpers import tiny_overrides

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]
# DataLoader's workers look for their parent every 5 seconds.
PATIENCE = 30
MARK = "DEEM_TEST_MARK"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc")


def processes(mark: str) -> list[str]:
    """Returns the command lines of the processes that have a mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # another user's, or gone
    return found


def wait_until(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.2)
    return condition()


def leaves_none(command: list[str], started: int, number: signal.Signals, log: Path, env=None, says: bytes = b""):
    """Sends a command alone a signal once so many processes run and its log `says` so, and expects all to end."""
    mark = uuid.uuid4().hex
    with log.open("wb") as out:
        process = subprocess.Popen(command, env={**os.environ, **(env or {}), MARK: mark}, stdout=out, stderr=out)
    try:
        busy = wait_until(lambda: len(processes(mark)) >= started and says in log.read_bytes(), 300)
        assert busy, log.read_text()[-3000:]
        assert process.poll() is None, log.read_text()[-3000:]
        process.send_signal(number)
        assert process.wait(PATIENCE) != 0
        assert wait_until(lambda: not processes(mark), PATIENCE), processes(mark)
    finally:
        process.kill()


PARENT = """
import os, subprocess, time
from deem_plugin.children import child_command, end_forks_with_this
end_forks_with_this()
subprocess.Popen(child_command("http.server", "0", "--bind", "127.0.0.1"))
if not os.fork():
    os.fork()
time.sleep(600)
"""


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_children_and_forks_end_with_their_parent(tmp_path, number):
    leaves_none([sys.executable, "-c", PARENT], 4, number, tmp_path / "log.txt")


def test_a_child_whose_parent_is_gone_already_ends(tmp_path):
    """A process that was never its parent stands for one that has died before the child could look."""
    command = [sys.executable, "-m", "deem_plugin.children", str(os.getpid() + 1), "http.server", "0"]
    assert subprocess.run(command, timeout=PATIENCE, capture_output=True).returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ends")
    tiny_llava(folder / "llava")
    for split in SPLITS:
        write_robustvqa(
            robustvqa_rows(split, images=400), folder / "home" / "robustvqa" / f"robustvqa_{split}.parquet"
        )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("ranks", [1, 2])
def test_evaluation_leaves_no_process(checkpoint, tmp_path, ranks, number):
    command = [sys.executable, "-m", "deem_plugin", "eval", str(checkpoint / "llava"), "--num-processes", str(ranks)]
    command += ["--", "--tasks", "robustvqa", "--batch_size", "1", "--output_path", str(tmp_path / "out")]
    env = {**offline_env(checkpoint), "DEEM_HOME": str(checkpoint / "home"), "ACCELERATE_USE_CPU": "true"}
    leaves_none(command, 2 if ranks == 1 else 4, number, tmp_path / "log.txt", env, b"Answering")


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("launcher", [[sys.executable, "-m"], TORCHRUN], ids=["workers", "ranks"])
def test_training_leaves_no_process(parts, tmp_path, launcher, number):
    settings = {"model__model": parts / "llava", "data__cache_dir": tmp_path / "cache", "training__max_steps": 100_000}
    settings["training__dataloader_num_workers"] = 2
    overrides = tiny_overrides(parts, tmp_path / "out", feedback=None, **settings)
    command = [*launcher, "deem_plugin.cli", "train", "tiny-tune", *overrides, "feedback=null"]
    leaves_none(
        command, 3 if launcher[-1] == launcher[1] else 7, number, tmp_path / "log.txt", {"OMP_NUM_THREADS": "1"}
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_the_demo_leaves_no_process(tmp_path, number):
    command = [sys.executable, "-m", "deem_plugin", "demo", "--fast", "--out", str(tmp_path / "demo")]
    leaves_none(command, 3, number, tmp_path / "log.txt")
