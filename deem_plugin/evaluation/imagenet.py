"""ImageNet's 1,000 classes and their names, and the pictures of a folder that is sorted by them."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from deem_plugin.data.images import IMAGE_SUFFIXES
from deem_plugin.evaluation.questions import QuestionDataError

# Where open_clip's curated names still leave two classes alike.
_CLEARER_NAMES = {
    "n02963159": "knitted cardigan",  # the Welsh corgi is a Cardigan, too
    "n04008634": "projectile",  # "missile" is the name of n03773504
}
# Classes of which the one is right, or as good as right, wherever the other is, though their names do not show it;
# several are named by Beyer et al. 2020 (https://arxiv.org/abs/2006.07159).
_SAME_THING = (
    ("n04355933", "n04356056"),  # sunglass, sunglasses
    ("n03642806", "n03832673"),  # laptop, notebook
    ("n02808440", "n04493381"),  # bathtub, tub
    ("n03710637", "n03710721"),  # maillot, maillot (tank suit)
    ("n03773504", "n04008634"),  # missile, projectile
    ("n03782006", "n04152593"),  # monitor, screen
    ("n12144580", "n13133613"),  # corn, ear
    ("n01871265", "n02504013"),  # tusker, Indian elephant
    ("n01871265", "n02504458"),  # tusker, African elephant
    ("n02979186", "n04392985"),  # cassette player, tape player
)
_WNID = re.compile(r"n\d{8}")


@cache
def wnids() -> tuple[str, ...]:
    """Returns the WordNet ids of the 1,000 classes, in the order of the class index."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())


@cache
def words() -> tuple[tuple[str, ...], ...]:
    """Returns for each class WordNet's words for it, the usual one first."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return tuple(tuple(info.index_to_description(index).split(", ")) for index in range(len(wnids())))


@cache
def published_names() -> tuple[str, ...]:
    """Returns the class names that the authors ask with: WordNet's first word, underscores and duplicates included."""
    return tuple(first.replace(" ", "_") for first, *_ in words())


@cache
def clear_names() -> tuple[str, ...]:
    """Returns class names that tell the classes apart ("crane bird", "construction crane"): open_clip's, and ours."""
    from open_clip import IMAGENET_CLASSNAMES

    return tuple(_CLEARER_NAMES.get(wnid, name) for wnid, name in zip(wnids(), IMAGENET_CLASSNAMES, strict=True))


def plain(name: str) -> str:
    """Returns a name for comparison: lower case, spaces for underscores and hyphens."""
    return " ".join(re.sub(r"[_\-]", " ", name).casefold().split())


@cache
def classes_called(name: str) -> frozenset[int]:
    """Returns the classes that go by a name, in any of the lists and among WordNet's words; "crane" has two."""
    return frozenset(index for index, names in enumerate(_all_names()) if plain(name) in names)


@cache
def _all_names() -> tuple[frozenset[str], ...]:
    from open_clip import IMAGENET_CLASSNAMES

    listed = zip(words(), clear_names(), IMAGENET_CLASSNAMES, strict=True)
    return tuple(frozenset(map(plain, (*wordnet, *curated))) for wordnet, *curated in listed)


@cache
def same_thing() -> frozenset[tuple[int, int]]:
    """
    Returns the pairs of classes, both ways round, that no question can tell apart by their clear names.

    These are pairs of which one name is equal to the other, is a WordNet word for the other class, or is the other
    with a word before it ("snow leopard" and "leopard"), and those that are known to be one thing.
    """
    names = list(map(plain, clear_names()))
    synonyms = [set(map(plain, wordnet)) for wordnet in words()]
    pairs = {(wnids().index(one), wnids().index(other)) for one, other in _SAME_THING}
    for one, name in enumerate(names):
        for other, longer in enumerate(names):
            if one != other and (name == longer or name in synonyms[other] or longer.endswith(f" {name}")):
                pairs.add((one, other))
    return frozenset(pairs | {(other, one) for one, other in pairs})


@dataclass(frozen=True)
class ClassFolders:
    """
    The pictures of a folder with one subfolder for each class.

    Args:
        root (`Path`): The folder.
        paths (`tuple[str, ...]`): Pictures relative to it, with forward slashes, in order of class and name.
        labels (`tuple[int, ...]`): Class index of each picture, from the name of its subfolder.
        classes (`frozenset[int]`): The classes that have a subfolder.
        ignored (`int`): Number of files in the subfolders that are no pictures by their ending.
    """

    root: Path
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    classes: frozenset[int]
    ignored: int


def folder_class(name: str) -> int | None:
    """Returns the class index of a subfolder called by a wnid, or by an index 0..999; `None` for other names."""
    if _WNID.fullmatch(name):
        return wnids().index(name) if name in wnids() else None
    return int(name) if re.fullmatch(r"\d{1,3}", name) else None


def class_folders(root: Path) -> list[tuple[Path, int | None]]:
    """
    Lists the subfolders of a data set by name, each with its class index, see `folder_class`.

    Hidden ones and files beside them (a README) do not count.

    Raises:
        QuestionDataError: If there is no such data set.
    """
    if not root.is_dir():
        raise QuestionDataError(
            f"No such folder: {root}. Give a folder with one subfolder of pictures for each class."
        )
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [(path, folder_class(path.name)) for path in folders]


def list_pictures(root: str | Path) -> ClassFolders:
    """
    Lists a data set as it is distributed: subfolders called by wnid (ImageNet-A, -R) or by class index (ImageNet-V2).

    Raises:
        QuestionDataError: If the folder is missing, has a subfolder that names no class, mixes both layouts, or holds
            no picture.
    """
    root = Path(root).expanduser()
    folders = class_folders(root)
    if unknown := [path.name for path, index in folders if index is None]:
        raise QuestionDataError(
            f"{root} has {len(unknown)} folders that are no class of ImageNet-1k ({', '.join(unknown[:5])}); expected "
            f"wnids such as {wnids()[0]}, or class indices 0..999. Give the folder that holds the class folders."
        )
    if len({bool(_WNID.fullmatch(path.name)) for path, _ in folders}) > 1:
        raise QuestionDataError(f"{root} mixes folders called by wnid and by class index; give one data set.")
    by_class = {index: path for path, index in folders}
    if len(by_class) < len(folders):
        raise QuestionDataError(f"{root} has two folders of one class, such as 7 and 007; give one data set.")
    paths, labels, ignored = [], [], 0
    for label, folder in sorted(by_class.items()):
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES:
                paths.append(path.relative_to(root).as_posix())
                labels.append(label)
            else:
                ignored += 1
    if not paths:
        raise QuestionDataError(f"{root} holds no picture in class folders ({', '.join(IMAGE_SUFFIXES)}).")
    return ClassFolders(root, tuple(paths), tuple(labels), frozenset(by_class), ignored)
