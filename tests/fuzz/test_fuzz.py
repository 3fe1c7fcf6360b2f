"""Every reader for some seconds, in a process of its own: what is wrong in a file may end the interpreter."""

import subprocess
import sys

import pytest

from .readers import READERS

SECONDS = 3


@pytest.mark.slow
def test_readers_stand_spoiled_files():
    command = [sys.executable, "-m", "tests.fuzz", str(SECONDS)]

    run = subprocess.run(command, capture_output=True, text=True, timeout=600)

    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    assert run.stdout.count(" ended otherwise") == len(READERS)
