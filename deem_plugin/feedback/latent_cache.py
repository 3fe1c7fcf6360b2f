"""
Latents that are computed once: what a frozen VAE says of each picture, known by the picture itself.

A cache is a folder with a `manifest.json`, which tells the VAE, and shards of safetensors. A shard gets its name only
once it is complete, holds a checksum of each entry in its header, and is never written again; so a kill costs the
unfinished shard at most, and any number of processes may read while one writes.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..files import write_whole

MANIFEST_NAME = "manifest.json"
FORMAT = 1
# Entries a shard: 32 MiB for Stable Diffusion at 512 pixels.
SHARD_ENTRIES = 256
# Parts of an autoencoder that encoding never asks.
_DECODER = ("decoder.", "post_quant_conv.")
# What is done to latents after the cache.
_AFTERWARDS = ("scaling_factor", "shift_factor")


def picture_keys(pictures) -> list[str]:
    """
    Returns a key of each picture `(batch, 3, height, width)` in [0, 1]: SHA-256 of its size and its pixels, rounded to
    8 bits, which takes away what normalising and un-normalising adds in float32. A mirrored picture is another
    picture.
    """
    pixels = (pictures * 255).round().to(torch.uint8).contiguous().cpu().numpy()
    size = f"{tuple(pictures.shape[1:])}".encode()
    return [hashlib.sha256(size + picture.tobytes()).hexdigest() for picture in pixels]


def fingerprint(diffusion_model) -> dict:
    """
    Returns all that the cached values depend on but the pictures: the encoding half of the VAE, and the picture size.
    Raises a `ValueError` if the diffusion model works on pixels, so that there is nothing to cache.
    """
    vae = getattr(diffusion_model.codec, "vae", None)
    if vae is None:
        raise ValueError(
            "The diffusion model works on pixels and has no VAE, so that there is nothing to cache. Leave "
            "`feedback.diffusion_model.latent_cache` out."
        )
    weights = hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        if not name.startswith(_DECODER):
            weights.update(f"{name}{tuple(value.shape)}".encode())
            weights.update(_bytes_of(value))
    config = {name: value for name, value in vae.config.items() if name[0] != "_" and name not in _AFTERWARDS}
    described = {
        "format": FORMAT,
        "image_size": diffusion_model.image_size,
        "vae": type(vae).__name__,
        "vae_dtype": str(vae.dtype).removeprefix("torch."),
        "vae_weights": weights.hexdigest(),
        **{f"vae_config.{name}": value for name, value in config.items()},
    }
    return json.loads(json.dumps(described))  # tuples as the lists that a manifest gives back


class LatentCache:
    """
    Reads a cache of latents that `deem cache-latents` has filled, memory-mapped, and verifies each entry that it hands
    out. `expected` is the [`fingerprint`] of the diffusion model that will use it.

    Raises:
        ValueError: If there is no cache, or it was filled with another VAE or for another picture size.
    """

    def __init__(self, folder: str | os.PathLike, expected: dict):
        self.folder = Path(folder)
        if not (self.folder / MANIFEST_NAME).is_file():
            raise ValueError(
                f"There is no latent cache in {self.folder}: it has no {MANIFEST_NAME}. Fill it by `deem "
                f"cache-latents RECIPE feedback.diffusion_model.latent_cache={self.folder}`, or leave that setting "
                f"out."
            )
        _check_manifest(self.folder, expected)
        self._shards: dict[str, Path] = {}
        self._open: dict[Path, safe_open] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            self._shards.update(dict.fromkeys(self._shard(path).keys(), path))

    def __contains__(self, key: str) -> bool:
        return key in self._shards

    def __len__(self) -> int:
        return len(self._shards)

    def look_up(self, pictures):
        """
        Returns the posterior of each picture `(batch, 3, height, width)` in [0, 1], as [`DiffusionModel.posterior`]
        would.

        Raises:
            ValueError: If a picture is not in the cache, or what the cache holds of it is damaged.
        """
        keys = picture_keys(pictures)
        for index, key in enumerate(keys):
            if key not in self:
                raise ValueError(
                    f"Picture {index} of a batch of {len(keys)} ({tuple(pictures.shape[1:])}, key {key[:16]}) is not "
                    f"among the {len(self)} in the latent cache {self.folder}. Run `deem cache-latents RECIPE` with "
                    f"this run's data, image processor and precision (pictures that are cast to bfloat16 before the "
                    f"tower are other pictures), or leave `feedback.diffusion_model.latent_cache` out."
                )
        entries = torch.stack([self._read(key) for key in keys]).to(pictures.device)
        return entries[:, 0], entries[:, 1] if entries.shape[1] > 1 else None

    def _read(self, key: str):
        """Returns the entry of a key, `(2, channels, h, w)`: mean and deviation, or `(1, ...)` without a deviation."""
        path = self._shards[key]
        try:
            shard = self._shard(path)
            entry, checksum = shard.get_tensor(key), shard.metadata()[key]
        except (SafetensorError, KeyError) as error:
            raise _damaged(path, error) from error
        if _checksum(key, entry) != checksum:
            raise _damaged(path, f"the checksum of the entry {key[:16]} does not fit")
        return entry

    def _shard(self, path: Path):
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise _damaged(path, error) from error
        return self._open[path]


class LatentWriter:
    """
    Adds entries to a cache of latents, shard by shard. One writer at a time for a folder. As a context manager it
    writes the last, shorter shard too, also when it is left by an error or by Ctrl-C.

    Args:
        folder (`str` or `PathLike`): Made when it does not exist.
        expected (`dict`): The [`fingerprint`] of the diffusion model; that of a folder already begun must be the same.
        shard_entries (`int`): Entries a shard; what a kill may cost.
    """

    def __init__(self, folder: str | os.PathLike, expected: dict, shard_entries: int = SHARD_ENTRIES):
        self.folder = Path(folder)
        self.shard_entries = shard_entries
        self._pending: dict[str, torch.Tensor] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest = self.folder / MANIFEST_NAME
        if manifest.exists():
            _check_manifest(self.folder, expected)
        else:
            write_whole(manifest, json.dumps(expected, indent=2).encode())
        for left_over in self.folder.glob("*.partial"):
            left_over.unlink()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.flush()

    def add(self, key: str, mean, std=None):
        """Adds an entry: `mean` and `std` of one picture, `(channels, h, w)` each; `std` is None where none exists."""
        self._pending[key] = torch.stack([mean] if std is None else [mean, std]).cpu()
        if len(self._pending) >= self.shard_entries:
            self.flush()

    def flush(self):
        """Writes what has been added since the last shard as a new one."""
        if not self._pending:
            return
        checksums = {key: _checksum(key, entry) for key, entry in self._pending.items()}
        # Named by what it holds, so that no two shards meet under one name.
        name = hashlib.sha256("".join(checksums.values()).encode()).hexdigest()[:16]
        write_whole(self.folder / f"{name}.safetensors", save(self._pending, metadata=checksums))
        self._pending = {}


def _bytes_of(tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _checksum(key: str, entry) -> str:
    """Returns a checksum of an entry and of its key, so that exchanged entries are found, too."""
    digest = hashlib.sha256(f"{key}{tuple(entry.shape)}".encode())
    digest.update(_bytes_of(entry))
    return digest.hexdigest()


def _check_manifest(folder: Path, expected: dict):
    """Raises a `ValueError` that says in what the cache in `folder` differs from what is expected."""
    path = folder / MANIFEST_NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}), so that nobody can tell what the cache was filled with. Delete the folder "
            f"and run `deem cache-latents RECIPE`."
        ) from error
    differences = [
        f"{name} is {found.get(name)!r} there and {expected.get(name)!r} here"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
    if differences:
        raise ValueError(
            f"The latent cache {folder} belongs to another diffusion model: {'; '.join(differences)}. Set "
            f"`feedback.diffusion_model.latent_cache` to a folder of its own for each VAE and picture size, and fill "
            f"it by `deem cache-latents RECIPE`."
        )


def _damaged(path: Path, reason) -> ValueError:
    return ValueError(
        f"The shard {path} of the latent cache is damaged ({reason}). Delete this file and run `deem cache-latents "
        f"RECIPE`: only the pictures that it held are encoded again."
    )
