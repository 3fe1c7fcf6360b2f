"""
Processes that end with the one that started them, whatever ended it.

`python -m deem_plugin.children PARENT MODULE [ARGUMENT ...]` is `python -m MODULE [ARGUMENT ...]` that is killed when
the process `PARENT`, which started it, is gone. A killed parent can end nobody, so each child looks for itself.
"""

import functools
import os
import runpy
import signal
import sys
import threading
import time

POLL_SECONDS = 0.5
MODULE = "deem_plugin.children"
# Stands for the parent of a rank, whose process id nobody knows before the launcher runs.
LAUNCHER = "launcher"


def child_command(module: str, *arguments: str) -> list[str]:
    """Returns the command that runs a module in a child of this process."""
    return [sys.executable, "-m", MODULE, str(os.getpid()), module, *arguments]


def end_with_parent(parent: int | None = None):
    """
    Kills this process as soon as its parent is gone, and so the processes that it forks.

    Args:
        parent (`int`, *optional*): Process id of the parent; that of now without it.
    """
    parent = os.getppid() if parent is None else parent
    threading.Thread(target=_watch, args=(parent,), name="parent watch", daemon=True).start()
    end_forks_with_this()


@functools.cache
def end_forks_with_this():
    """Has each process that is forked from this one, such as the workers of a data set, end with its parent."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=end_with_parent)


def _watch(parent: int):
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    # Not SIGTERM: the main thread, which would handle it, may wait for a process that is gone.
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    started_by, name, *rest = sys.argv[1:]
    end_with_parent(None if started_by == LAUNCHER else int(started_by))
    sys.argv[1:] = rest
    runpy.run_module(name, run_name="__main__", alter_sys=True)
