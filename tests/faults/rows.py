"""A row of the table of faults: how it is made, the command that meets it, and what the command must say."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..training.helpers import tiny_overrides

QUESTION = {"from": "human", "value": "<image>\nIs it noise?"}
ANSWER = {"from": "gpt", "value": "yes"}


@dataclass(frozen=True)
class Row:
    """
    Args:
        name (`str`): Of the fault.
        argv (`Callable`): Makes it in a `Place`, and returns the arguments of the `deem` command that meets it.
        says (`str`): Regular expression of what the user reads: of the message, or, where the command accepts it, of
            its output.
        code (`int`): Exit code.
        slow (`bool`): Whether it trains.
        lines (`int`): Most lines of the message.
    """

    name: str
    argv: Callable[["Place"], list]
    says: str
    code: int = 1
    slow: bool = False
    lines: int = 2


@dataclass
class Place:
    """
    Where a fault is made: an empty `folder`, beside the tiny `parts` that nobody may change; `trained` returns a copy
    of a finished run with two checkpoints.
    """

    folder: Path
    parts: Path
    trained: Callable[[Path], Path]

    def train(self, *overrides, feedback="feedback", recipe="tiny-tune", **settings) -> list:
        """Returns the command that trains for one step on the parts, but for what is given."""
        settings = {"model__model": self.parts / "llava", "training__max_steps": 1, **settings}
        tiny = tiny_overrides(self.parts, self.folder / "out", feedback, **settings)
        return ["train", recipe, *tiny, *([] if feedback else ["feedback=null"]), *overrides]

    def check(self, path: Path, **settings) -> list:
        """Returns the command that checks the data at `path`."""
        return ["data", "check", *self.train(data__path=path, feedback=None, **settings)[1:]]

    def file(self, name: str, content) -> Path:
        """Writes bytes, a text, or anything else as JSON."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    def changed(self, part: str, change: Callable[[Path], object]) -> Path:
        """Returns a copy of one of the parts, changed."""
        folder = Path(shutil.copytree(self.parts / part, self.folder / f"changed-{part}"))
        change(folder)
        return folder

    def empty(self) -> Path:
        """Makes an empty folder."""
        (self.folder / "empty").mkdir()
        return self.folder / "empty"


def record(**fields) -> dict:
    """Makes a conversation about a picture of the parts, in LLaVA's layout; `...` leaves a field out."""
    made = {"id": 0, "image": "1.png", "conversations": [QUESTION, ANSWER], **fields}
    return {key: value for key, value in made.items() if value is not ...}


def turns(*texts: str) -> list[dict]:
    """Makes the turns of a conversation, the user's first."""
    return [{"from": "gpt" if number % 2 else "human", "value": text} for number, text in enumerate(texts)]


def edited(path: Path, **fields) -> None:
    """Lays fields over a JSON object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def halved(path: Path) -> None:
    """Cuts a file in the middle."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
