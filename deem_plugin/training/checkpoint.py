"""Keeps what is on disk whole: writable output, complete checkpoints, a final save in one piece."""

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

logger = logging.getLogger(__name__)

FINAL_NAME = "final"
_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
# The last file that a Trainer writes into a checkpoint.
_LAST_FILE = "trainer_state.json"


def check_writable(folder: str | os.PathLike):
    """
    Creates the output folder and writes a file into it, before anything costly is done.

    Raises:
        ValueError: If that fails.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise ValueError(
            f"The output folder {folder} cannot be written ({error.strerror or error}). Set `training.output_dir` to "
            f"a folder on a disk with space, where you may write."
        ) from error


def _checkpoints(folder: str | os.PathLike) -> list[Path]:
    """Returns the Trainer's checkpoints in `folder`, oldest step first."""
    if not Path(folder).is_dir():
        return []
    found = [path for path in Path(folder).iterdir() if path.is_dir() and _CHECKPOINT.match(path.name)]
    return sorted(found, key=lambda path: int(_CHECKPOINT.match(path.name)[1]))


def _is_complete(checkpoint: Path, files: Iterable[str]) -> bool:
    return all((checkpoint / name).is_file() for name in (_LAST_FILE, *files))


def last_complete_checkpoint(folder: str | os.PathLike, files: Iterable[str] = ()) -> Path | None:
    """Returns the newest checkpoint with all that the Trainer writes and the further `files` of callbacks, or None."""
    complete = [path for path in _checkpoints(folder) if _is_complete(path, files)]
    return complete[-1] if complete else None


def set_aside_incomplete(folder: str | os.PathLike, files: Iterable[str] = ()):
    """
    Renames checkpoints that a failed save left half-written, so that nothing takes them for the newest.

    A Trainer writes straight into `checkpoint-<step>`, its state last, and `get_last_checkpoint` looks at names only;
    the further `files` are those that callbacks write after it.
    """
    for path in _checkpoints(folder):
        if not _is_complete(path, files):
            aside = path.with_name(f"incomplete-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            logger.warning("The save of %s failed half-way; it is now %s.", path.name, aside)


def save_in_one_piece(
    folder: Path, write: Callable[[str], None], is_writer: bool, barrier: Callable[[], None]
) -> Path:
    """
    Lets `write` fill a folder beside `folder` and gives it its name only when it is complete.

    Args:
        folder (`Path`): Where the result belongs. What an earlier run left there stays until then.
        write (`Callable`): Takes the path of the folder to fill. Called on every rank, since gathering sharded
            weights needs all of them.
        is_writer (`bool`): Whether this process is the one that writes files.
        barrier (`Callable`): Waits for all ranks.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    if is_writer:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    try:
        write(str(partial))
    except BaseException:
        if is_writer:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    barrier()
    if is_writer:
        replaced = folder.with_name(f"{folder.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    barrier()
    return folder


def check_finite(model):
    """
    Raises a `RuntimeError` if a trained weight is NaN or infinite, so that no such model is saved as a result.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise RuntimeError(
                f"The training has ended with weights that are not finite (first {name}), so nothing is saved as its "
                f"result. Look in the log for the step where `loss` or `grad_norm` became NaN, lower "
                f"`training.learning_rate` or set `training.max_grad_norm`, and resume from a checkpoint before it."
            )


def train_or_set_aside(trainer, files: Iterable[str] = ()):
    """
    Trains and writes the log of the losses; a run that fails leaves no half-written checkpoint as the newest.

    Args:
        trainer (`Trainer`): What is to be trained.
        files (`Iterable[str]`, *optional*): What callbacks add to each checkpoint.
    """
    args = trainer.args
    try:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    except BaseException:
        if args.should_save:
            set_aside_incomplete(args.output_dir, files)
        raise
    trainer.save_state()
    check_finite(trainer.model)
