"""
Tells by content what a model's answers depend on, for a response cache that cannot be stale.

The key of lmms-eval's `--use_cache` (0.7.3) holds the model's arguments and the task's configuration as text. A
checkpoint that is overwritten where it lies, or data that is imported anew under its old name, would get the answers
of its predecessor. Nothing in lmms-eval lets a model add to the key, so each content gets a cache folder of its own.
(The data of our own tasks is in their configuration, by its content hash.)
"""

import hashlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from deem_plugin.evaluation.loading import base_of_adapter, local_or_hub
from deem_plugin.evaluation.offline import cache_dir
from deem_plugin.hub import split_revision

# What a training run leaves beside a checkpoint to go on from there; no model is loaded from it.
_TRAINING_STATE = ("optimizer", "scheduler", "scaler", "rng_state", "trainer_state", "training_args")
_CHUNK = 1 << 24  # bytes


def fingerprint(pretrained: str | Path) -> str:
    """
    Returns a hash of a checkpoint and of the benchmarks imported for lmms-eval's own tasks.

    Of a local folder every file counts but the state of training; of an adapter, its base model, too; of a hub id, the
    commit. An import counts as new whenever it is done again; imports are those that this process's environment finds.

    Args:
        pretrained (`str` or `Path`): Checkpoint folder, hub id, or folder of a peft adapter.

    Returns:
        `str`: 16 hexadecimal digits.

    Raises:
        ValueError: If there is no such checkpoint.
        OSError: If a file cannot be read, or a hub id can neither be reached nor found in the cache.
    """
    digest = hashlib.sha256()
    for part in chain(_checkpoint_parts(str(pretrained)), _import_parts()):
        digest.update(part)
    return digest.hexdigest()[:16]


def _checkpoint_parts(pretrained: str) -> Iterator[bytes]:
    folder = Path(local_or_hub(pretrained))
    if not folder.is_dir():
        yield b"hub:" + _commit(pretrained).encode()
        return
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith(_TRAINING_STATE):
            yield f"file:{path.name}:{path.stat().st_size}:".encode()
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    yield chunk
    if (folder / "adapter_config.json").is_file():
        yield from _checkpoint_parts(base_of_adapter(pretrained))


def _commit(hub_id: str) -> str:
    """Returns the commit of a hub id that would be loaded now: what is published, or offline what is in the cache."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    name, revision = split_revision(hub_id)
    config = cached_file(name, "config.json", revision=revision)
    return extract_commit_hash(config, None) or str(config)


def _import_parts() -> Iterator[bytes]:
    # By time instead of by content: hashing POPE's 2.8 GB before every run would cost more than it saves.
    for path in sorted(cache_dir().glob("*/*/0.0.0/deem-local-*/*.arrow")):
        status = path.stat()
        yield f"import:{path.relative_to(cache_dir())}:{status.st_size}:{status.st_mtime_ns}".encode()
