"""Builds RobustVQA from ImageNet-A, -R and -V2: pictures that CLIP gets wrong, with what it takes them for."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deem_plugin.evaluation import imagenet
from deem_plugin.evaluation.clip import load_clip
from deem_plugin.evaluation.imagenet import ClassFolders
from deem_plugin.evaluation.manifest import write_manifest
from deem_plugin.evaluation.mining import Mined, Rule, admitted_classes, mine_pictures
from deem_plugin.evaluation.questions import QuestionDataError, content_hash
from deem_plugin.evaluation.robustvqa import SPLITS, write_robustvqa

PROTOCOLS = ("corrected", "official")
CANDIDATES = ("split", "all")
TEMPLATE = "A photo of a {}"
_PROGRESS = ".progress"  # folder of an unfinished build
_PACKAGES = ("deem-plugin", "torch", "open_clip_torch", "timm", "transformers", "pillow", "pyarrow")


def build_robustvqa(
    folders: Mapping[str, str | Path],
    clip_name: str,
    out: str | Path,
    *,
    pretrained: str | None = None,
    protocol: str = "corrected",
    candidates: str | None = None,
    skip_unreadable: bool = False,
    batch_size: int = 64,
    device: str | None = None,
) -> dict[str, Any]:
    """
    Builds `robustvqa_<split>.parquet` for each given split, and `manifest.json`.

    A picture is kept when CLIP scores a wrong class above the right one; the highest such class is asked about. A
    build that was interrupted goes on where it was when it is started again, and comes to the same content hash.

    Args:
        folders (`Mapping`): Folder of class folders by split: "a", "r", "v2", or some of them.
        clip_name (`str`), pretrained (`str`, *optional*), device (`str`, *optional*): See [`load_clip`].
        out (`str` or `Path`): Folder for the files.
        protocol (`str`, *optional*, defaults to `"corrected"`):
            "corrected" has names that tell the classes apart, cosine similarity, and refuses wrong classes that are
            the same thing as the right one. "official" has the published names and unnormalised text features over
            all classes; pairs of equal names, to which both answers are right, are left out.
        candidates (`str`, *optional*):
            Where wrong classes are from: "split" (the classes with a folder; the default) or "all" 1,000. The
            official protocol knows "all" only.
        skip_unreadable (`bool`, *optional*): Whether to leave out pictures that cannot be read, rather than to fail.
        batch_size (`int`, *optional*, defaults to 64): Pictures a batch.

    Returns:
        `dict`: The manifest.

    Raises:
        ValueError: For an unknown option, or a model that cannot be loaded.
        QuestionDataError: If a folder is not as distributed, pictures cannot be read, or no picture fools CLIP.
    """
    candidates = candidates or ("all" if protocol == "official" else "split")
    _check_options(folders, protocol, candidates, batch_size)
    out = Path(out).expanduser()
    listed = {split: imagenet.list_pictures(folders[split]) for split in SPLITS if split in folders}
    clip = load_clip(clip_name, pretrained, device)
    names = {"corrected": imagenet.clear_names(), "official": imagenet.published_names()}
    texts = {
        "corrected": clip.text_features([TEMPLATE.format(name) for name in names["corrected"]]),
        # The authors' code leaves the lengths of the text features in, and the underscores.
        "official": clip.text_features([TEMPLATE.format(name) for name in names["official"]], normalize=False),
    }
    manifest = {
        "benchmark": "RobustVQA",
        "options": {"protocol": protocol, "candidates": candidates, "template": TEMPLATE, "batch_size": batch_size},
        "clip": {
            "name": clip_name,
            "pretrained": pretrained,
            "weights_sha256": clip.weights_hash(),
            "logit_scale": clip.logit_scale,
            "preprocessing": clip.preprocessing,
        },
        "versions": {package: version(package) for package in _PACKAGES},
        "splits": {},
        "files": {},
    }
    for split, pictures in listed.items():
        wrong = pictures.classes if candidates == "split" else range(len(names["corrected"]))
        key = [manifest["clip"], manifest["versions"], candidates, _digest(names), sorted(wrong)]
        key = json.dumps([*key, sorted(imagenet.same_thing())], default=str)
        log = out / _PROGRESS / f"{split}.jsonl"
        results = mine_pictures(pictures, clip, _rules(texts, wrong), log, key, batch_size)
        kept = _kept(pictures, results, protocol)
        counts = _checked_counts(pictures, results, kept, clip_name, skip_unreadable)
        path = out / f"robustvqa_{split}.parquet"
        write_robustvqa(_rows(split, pictures, kept, names[protocol]), path)
        manifest["files"][path.name] = content_hash(path)
        manifest["splits"][split] = counts | {"candidate_classes": len(wrong)}
    manifest["content_hash"] = _digest(manifest["files"])
    write_manifest(out, json.loads(json.dumps(manifest, default=str)))
    shutil.rmtree(out / _PROGRESS)  # only now is the work of an interrupted run of no more use
    return manifest


def _checked_counts(
    pictures: ClassFolders, results: list, kept: list, clip_name: str, skip_unreadable: bool
) -> dict[str, Any]:
    """Returns what became of the pictures of a split; raises if there is nothing to ask or some cannot be read."""
    unreadable = [path for path, result in zip(pictures.paths, results, strict=True) if result is None]
    if unreadable and not skip_unreadable:
        raise QuestionDataError(
            f"{len(unreadable)} of {len(pictures.paths)} pictures in {pictures.root} cannot be read: "
            f"{', '.join(unreadable[:20])}{', ...' if len(unreadable) > 20 else ''}. Fetch them again, or leave "
            f"them out with `--skip-unreadable`. What is mined so far is kept."
        )
    if not kept:
        raise QuestionDataError(f"{clip_name} gets no picture of {pictures.root} wrong: there is nothing to ask.")
    return {
        "pictures": len(pictures.paths),
        "ignored_files": pictures.ignored,
        "unreadable": len(unreadable),
        "unreadable_files": unreadable,
        "kept": len(kept),
        "questions": 2 * len(kept),
        **_counts(pictures, results),
    }


def _check_options(folders: Mapping, protocol: str, candidates: str, batch_size: int) -> None:
    if not folders or set(folders) - set(SPLITS):
        raise ValueError(
            f"Give at least one folder (--imagenet-a, --imagenet-r, --imagenet-v2); got {sorted(folders)}."
        )
    if protocol not in PROTOCOLS:
        raise ValueError(f"Unknown protocol {protocol!r}; choose one of {', '.join(PROTOCOLS)}.")
    if candidates not in CANDIDATES:
        raise ValueError(f"Unknown candidates {candidates!r}; choose one of {', '.join(CANDIDATES)}.")
    if protocol == "official" and candidates != "all":
        raise ValueError("The official protocol mines over all 1,000 classes; leave `--candidates` out.")
    if batch_size < 1:
        raise ValueError(f"`--batch-size` must be positive, got {batch_size}.")


def _rules(texts: dict, candidates) -> dict[str, Rule]:
    """Returns both protocols' rules, and the corrected one before it refuses any pair, to count those."""
    number = len(imagenet.wnids())
    return {
        "corrected": Rule(texts["corrected"], admitted_classes(number, candidates, imagenet.same_thing())),
        "unrefused": Rule(texts["corrected"], admitted_classes(number, candidates)),
        "official": Rule(texts["official"], admitted_classes(number, range(number))),
    }


def _well_defined(label: int, wrong: int) -> bool:
    """Tells whether the published names of two classes differ: else both answers to one question would be right."""
    names = imagenet.published_names()
    return imagenet.plain(names[label]) != imagenet.plain(names[wrong])


def _choice(protocol: str, label: int, result: dict[str, Mined]) -> int | None:
    """Returns the wrong class to ask about, or `None` where the protocol does not keep the picture."""
    mined = result[protocol]
    if not mined.fooled or (protocol == "official" and not _well_defined(label, mined.wrong)):
        return None
    return mined.wrong


def _kept(pictures: ClassFolders, results: list, protocol: str) -> list[tuple[str, int, int]]:
    """Returns path, right class and wrong class of the pictures to keep: one tuple each, so that none can slip."""
    kept = []
    for path, label, result in zip(pictures.paths, pictures.labels, results, strict=True):
        wrong = None if result is None else _choice(protocol, label, result)
        if wrong is not None:
            kept.append((path, label, wrong))
    return kept


def _counts(pictures: ClassFolders, results: list) -> dict[str, Any]:
    """Returns how often pairs were refused, and on how many pictures the protocols differ."""
    refused = equal = 0
    versus = {"same": 0, "other_wrong_class": 0, "only_corrected": 0, "only_official": 0}
    for label, result in zip(pictures.labels, results, strict=True):
        if result is None:
            continue
        unrefused, official = result["unrefused"], result["official"]
        refused += unrefused.fooled and (label, unrefused.wrong) in imagenet.same_thing()
        equal += official.fooled and not _well_defined(label, official.wrong)
        choices = {protocol: _choice(protocol, label, result) for protocol in PROTOCOLS}
        only = [protocol for protocol, wrong in choices.items() if wrong is not None]
        if len(only) == 1:
            versus[f"only_{only[0]}"] += 1
        elif only:
            versus["same" if choices["corrected"] == choices["official"] else "other_wrong_class"] += 1
    return {"refused_pairs": refused, "equal_names_in_official": equal, "pictures_by_protocol": versus}


def _rows(
    split: str, pictures: ClassFolders, kept: list[tuple[str, int, int]], names: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    for path, label, wrong in kept:
        image = (pictures.root / path).read_bytes()
        for answer, caption in (("yes", names[label]), ("no", names[wrong])):
            row = {
                "question_id": f"{split}/{path}#{answer}",
                "image_id": f"{split}/{path}",
                "image": image,
                "caption": caption,
                "answer": answer,
                "source": path,
            }
            check_row(row, names)
            yield row


def check_row(row: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """
    Compares a row with the folder that its picture is from, by nothing but the row itself.

    Raises:
        QuestionDataError: If the row answers yes to another class than its folder's, or no to that class.
    """
    label = imagenet.folder_class(Path(row["source"]).parent.name)
    if label is None or (row["caption"] == names[label]) != (row["answer"] == "yes"):
        raise QuestionDataError(
            f"The picture {row['source']} is of the class {None if label is None else names[label]!r}, but the answer "
            f"to {row['caption']!r} is {row['answer']!r}."
        )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
