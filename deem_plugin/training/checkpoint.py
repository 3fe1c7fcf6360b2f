"""Keeps what is on disk whole: output that can be written, checkpoints with a manifest, a final in one piece."""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from deem_plugin.files import write_whole

logger = logging.getLogger(__name__)

FINAL_NAME = "final"
# Value of `training.resume_from_checkpoint` that means the newest complete checkpoint of the output folder, if any.
RESUME_LAST = "last"
# Sizes and SHA-256 of a checkpoint's files. Written last, so a checkpoint without it was cut off.
MANIFEST = "manifest.json"
_CHECKPOINT = re.compile(rf"^{PREFIX_CHECKPOINT_DIR}-(\d+)$")
# How libraries report a full disk whose own errors carry no `errno`.
_FULL = re.compile(r"no space left|disk quota|os error 28\b|os error 122\b|PytorchStreamWriter|inline_container", re.I)


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


def write_manifest(checkpoint: Path):
    """Writes the sizes and SHA-256 of a checkpoint's files beside them, in one piece: it is complete from then on."""
    entries = {str(path.relative_to(checkpoint)): _entry(path) for path in _files(checkpoint)}
    write_whole(checkpoint / MANIFEST, json.dumps({"files": entries}, indent=1).encode())


def find_damage(checkpoint: Path) -> str | None:
    """Returns what is wrong with a checkpoint, naming the first file, or None where all is as it was written."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        entries = {name: {key: entry[key] for key in ("size", "sha256")} for name, entry in files.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so its save was cut off, or another program wrote it"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} is damaged"
    for name, entry in entries.items():
        path = checkpoint / name
        if not path.is_file():
            return f"its file {name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"its file {name} has {path.stat().st_size} bytes, {entry['size']} were written"
        if _entry(path) != entry:
            return f"the contents of its file {name} are not what was written"
    return None


def resolve_resume(args):
    """
    Puts the folder of the checkpoint to resume from into `args.resume_from_checkpoint`, where callbacks look for it.

    With `last` it is the newest checkpoint whose files are what was written; what is newer, so damaged or cut off, is
    renamed to `damaged-checkpoint-<step>`. Checkpoints behind one that is named become `later-checkpoint-<step>`.

    Args:
        args (`RecipeTrainingArguments`): Of the run.

    Raises:
        ValueError: If a checkpoint that is named is missing or damaged, or the output folder holds checkpoints and the
            run neither resumes nor overwrites them.
    """
    wanted = args.resume_from_checkpoint
    if wanted is not None and not isinstance(wanted, str | os.PathLike):
        raise ValueError(
            f"`training.resume_from_checkpoint` is {wanted!r}; expected a `checkpoint-<step>` folder, or "
            f"`{RESUME_LAST}`."
        )
    with args.main_process_first(local=args.save_on_each_node, desc="checking checkpoints"):
        if wanted == RESUME_LAST:
            found = _newest_whole(args.output_dir) if args.should_save else _newest(args.output_dir)
            if args.should_save:
                logger.info("Resuming from %s.", found or "nothing: there is no complete checkpoint yet")
        else:
            found = None if wanted is None else Path(wanted)
            if args.should_save:
                _check_named(found)
                _clear(args.output_dir, found, args.overwrite_output_dir)
    args.resume_from_checkpoint = None if found is None else str(found)


def train_and_keep(trainer):
    """
    Trains, seals each checkpoint when it is complete, and writes the log of the losses.

    Args:
        trainer (`RecipeTrainer`): What is to be trained.

    Raises:
        ValueError: If a checkpoint finds no space on the disk.
        RuntimeError: If a trained weight is not finite at the end.
    """
    args = trainer.args
    trainer.add_callback(_SealCheckpoints())  # the last one, so that its `on_save` comes after the others'
    with naming_a_full_disk(args.output_dir):
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_state()
    check_finite(trainer.model)


class _SealCheckpoints(TrainerCallback):
    """Writes the manifest of each checkpoint when all ranks and callbacks have written, then deletes older ones."""

    def on_save(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()
        if args.should_save:
            write_manifest(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            rotate_checkpoints(args.output_dir, args.save_total_limit, state.best_model_checkpoint)


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

    Raises:
        ValueError: If there is no space on the disk.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    if is_writer:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    try:
        with naming_a_full_disk(folder.parent):
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


@contextmanager
def naming_a_full_disk(folder: str | os.PathLike) -> Iterator[None]:
    """Turns the error of whatever library met a full disk into a `ValueError` that names the folder and the remedy."""
    try:
        yield
    except Exception as error:
        if not (getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _FULL.search(str(error))):
            raise
        newest, kept = _newest(folder), "There is no complete checkpoint yet"
        if newest:
            takes = sum(path.stat().st_size for path in _files(newest))
            kept = f"The newest complete checkpoint is {newest.name} and takes {takes / 2**20:.0f} MiB"
        raise ValueError(
            f"The disk of {folder} is full ({shutil.disk_usage(folder).free / 2**20:.0f} MiB free). {kept}. "
            f"Free space, or keep fewer checkpoints (`training.save_total_limit`), and go on with "
            f"`training.resume_from_checkpoint={RESUME_LAST}`."
        ) from error


def check_room(folder: str | os.PathLike, model: torch.nn.Module):
    """
    Checks before the training that its result finds room.

    Raises:
        ValueError: If less is free than the model takes.
    """
    need = _size(model)
    free = shutil.disk_usage(folder).free
    if free < need:
        raise ValueError(
            f"The disk of {folder} has {free / 2**30:.1f} GiB free, and the trained model alone takes "
            f"{need / 2**30:.1f} GiB. Free space, or set `training.output_dir` to another disk."
        )


@contextmanager
def kept_room(folder: str | os.PathLike, model: torch.nn.Module) -> Iterator[Callable[[], None]]:
    """
    A context in which as much of the disk as a trained model takes is set aside in a file, until the function that it
    gives is called: a run without checkpoints would lose all it has learned on a disk that others have filled.
    """
    path = Path(folder) / "room-for-final"
    with open(path, "wb") as file, suppress(OSError, AttributeError):  # not on every file system, not on macOS
        os.posix_fallocate(file.fileno(), 0, _size(model))
    try:
        yield lambda: path.unlink(missing_ok=True)
    finally:
        path.unlink(missing_ok=True)


def _size(model) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


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


def _files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path != checkpoint / MANIFEST)


def _entry(path: Path) -> dict[str, int | str]:
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _checkpoints(folder: str | os.PathLike) -> list[Path]:
    """Returns the Trainer's checkpoints in `folder`, newest step first."""
    found = [path for path in Path(folder).glob("*") if path.is_dir() and _CHECKPOINT.match(path.name)]
    return sorted(found, key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    return int(_CHECKPOINT.match(checkpoint.name)[1])


def _newest(folder: str | os.PathLike) -> Path | None:
    """Returns the newest checkpoint that was complete once."""
    return next((path for path in _checkpoints(folder) if (path / MANIFEST).is_file()), None)


def _newest_whole(folder: str | os.PathLike) -> Path | None:
    """Returns the newest checkpoint without damage; renames what is newer."""
    for path in _checkpoints(folder):
        damage = find_damage(path)
        if damage is None:
            return path
        _set_aside(path, "damaged", damage)
    return None


def _set_aside(checkpoint: Path, prefix: str, why: str):
    aside = checkpoint.with_name(f"{prefix}-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    logger.warning("Left out %s: %s. It is now %s.", checkpoint, why, aside.name)


def _check_named(checkpoint: Path | None):
    """Raises a `ValueError` on a checkpoint that is missing or damaged."""
    if checkpoint is None:
        return
    if not checkpoint.is_dir():
        raise ValueError(
            f"There is no checkpoint {checkpoint} to resume from. Set `training.resume_from_checkpoint` to a "
            f"`checkpoint-<step>` folder, or to `{RESUME_LAST}`."
        )
    if damage := find_damage(checkpoint):
        raise ValueError(
            f"The checkpoint {checkpoint} cannot be resumed: {damage}. Set "
            f"`training.resume_from_checkpoint={RESUME_LAST}` for the newest one that is whole."
        )


def _clear(folder: str | os.PathLike, resumed: Path | None, overwrite: bool):
    """Deletes, renames or refuses the checkpoints in the output folder that the run would mix with its own."""
    checkpoints = _checkpoints(folder)
    goes_on = resumed is not None and any(path.resolve() == resumed.resolve() for path in checkpoints)
    for path in checkpoints:
        if goes_on:
            if _step(path) > _step(resumed):
                _set_aside(path, "later", f"the run goes on from {resumed.name}")
        elif overwrite:
            logger.warning("Deleting %s, as `training.overwrite_output_dir` says.", path)
            shutil.rmtree(path)
        else:
            raise ValueError(
                f"The output folder {folder} holds checkpoints of an earlier run ({path.name}). Set "
                f"`training.resume_from_checkpoint={RESUME_LAST}` to go on with it, "
                f"`training.overwrite_output_dir=true` to delete them, or another `training.output_dir`."
            )
