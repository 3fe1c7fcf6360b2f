"""Runs arms in processes of their own, two at a time, and shows how far they are."""

import os
import re
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

from tqdm.auto import tqdm

from deem_plugin.children import child_command

from .arms import COMPARE_FOLDER, PHASE, RESULTS_FOLDER

# Two processes of one thread each beat one of two threads: OpenMP's barriers wait for whoever else uses the machine.
PARALLEL = 2
POLL_SECONDS = 0.5
LOG_SECONDS = 20
# Enough of a log's end to hold a progress bar, and to explain a failure.
TAIL_BYTES = 8192
TAIL_LINES = 15
# What a tqdm bar looks like in a log.
_BAR = re.compile(r"\| *(\d+)/(\d+) \[")


def child_environment(out: Path) -> dict[str, str]:
    """Returns the environment of an arm: one thread, no hub, and data and caches of the demo's own."""
    cache = str(out / "cache")
    # Either of these would win over `DEEM_HOME`.
    inherited = {name: value for name, value in os.environ.items() if name not in ("DEEM_ROBUSTVQA", "DEEM_DETAILS")}
    return {
        **inherited,
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DEEM_HOME": str(out / "sets"),
        "HF_DATASETS_CACHE": cache,
        "LMMS_EVAL_DATASETS_CACHE": cache,
    }


class ArmProcess:
    """
    One running arm with its log and its progress bar.

    Args:
        out (`Path`): The demo's folder.
        folder (`Path`): The seed's folder.
        name (`str`): The arm.
        position (`int`): Line of its progress bar.
    """

    def __init__(self, out: Path, folder: Path, name: str, position: int):
        self.position = position
        self.title = f"{folder.name} {name}"
        (folder / name).mkdir(parents=True, exist_ok=True)
        self.log = folder / name / "log.txt"
        command = child_command("deem_plugin.demo.arms", str(folder), name)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=child_environment(out))
        # A log file, unlike a terminal, keeps every state of a bar.
        interval = POLL_SECONDS if sys.stderr.isatty() else LOG_SECONDS
        self.bar = tqdm(desc=self.title, position=position, leave=False, dynamic_ncols=True, mininterval=interval)

    def _tail(self) -> str:
        with self.log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
            return log.read().decode("utf-8", errors="replace")

    def is_done(self) -> bool:
        """Brings the bar up to date and returns whether the arm has ended; raises if it has failed."""
        tail = self._tail()
        phase = tail.rpartition(PHASE)[2].partition("\n")[0] if PHASE in tail else None
        if phase is not None and phase not in self.bar.desc:
            self.bar.set_description(f"{self.title} {phase}", refresh=False)
        if bars := _BAR.findall(tail.rpartition(PHASE)[2]):
            done, total = map(int, bars[-1])
            if total != self.bar.total or done < self.bar.n:
                self.bar.reset(total)
            self.bar.update(done - self.bar.n)
        code = self.process.poll()
        if code:
            lines = [line for line in tail.splitlines() if line.strip() and not _BAR.search(line)]
            raise RuntimeError(
                f"The arm {self.title} failed (exit code {code}). The end of {self.log}:\n"
                + "\n".join(lines[-TAIL_LINES:])
            )
        return code == 0

    def close(self):
        """Ends the process, if it still runs, and removes the bar."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()
        self.bar.close()


def run_arms(out: Path, jobs: list[tuple[Path, str]]):
    """
    Runs arms, `PARALLEL` at a time.

    Args:
        out (`Path`): The demo's folder.
        jobs (`list[tuple[Path, str]]`): Folder of the seed and name of the arm.

    Raises:
        RuntimeError: If one fails, with the end of its log; the others are stopped.
    """
    waiting = deque(jobs)
    running: list[ArmProcess] = []
    with tqdm(total=len(jobs), desc="arms", position=0, dynamic_ncols=True) as total:
        try:
            while waiting or running:
                while waiting and len(running) < PARALLEL:
                    free = min(set(range(1, PARALLEL + 1)) - {arm.position for arm in running})
                    running.append(ArmProcess(out, *waiting.popleft(), position=free))
                time.sleep(POLL_SECONDS)
                for arm in [arm for arm in running if arm.is_done()]:
                    running.remove(arm)
                    arm.close()
                    total.update()
        finally:
            for arm in running:
                arm.close()


def compare_arms(out: Path, folder: Path, base: str, new: str):
    """
    Runs `deem compare --html` on the evaluations of two arms of a seed; writes to `compare` in the seed's folder.

    Raises:
        RuntimeError: If it fails, with what it said.
    """
    results = [str(folder / name / RESULTS_FOLDER) for name in (base, new)]
    command = [*child_command("deem_plugin", "compare"), *results, "--out", str(folder / COMPARE_FOLDER), "--html"]
    done = subprocess.run(command, env=child_environment(out), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`deem compare` failed on {folder} (exit code {done.returncode}):\n{done.stderr}")
