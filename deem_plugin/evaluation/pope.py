"""
Puts POPE into the datasets cache, for lmms-eval's own tasks `pope`, `pope_adv`, `pope_pop` and `pope_random`.

POPE: https://arxiv.org/abs/2305.10355.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from deem_plugin.evaluation.offline import decodes, read_images, write_to_cache
from deem_plugin.evaluation.questions import QuestionDataError

CATEGORIES = ("adversarial", "popular", "random")
COLUMNS = ("id", "question_id", "question", "answer", "image_source", "image", "category")

DATASET = "lmms-lab-encoder/POPE"
_ROWS_A_CHUNK = 64


def import_pope(
    source: str | Path | Iterable[str | Path],
    image_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> dict[str, int]:
    """
    Imports POPE for offline use by lmms-eval; an earlier import is replaced.

    The Arrow files hold each question with its image, as a download would: about 2.8 GB for all 9,000 questions.

    Args:
        source (`str`, `Path` or several):
            Folder with the official `coco_pope_{random,popular,adversarial}.json`, or parquet files (or a folder of
            them) with the columns of the hub's data set.
        image_dir (`str` or `Path`, *optional*): Folder of the COCO val2014 images that the JSON files name.
        cache_dir (`str` or `Path`, *optional*):
            Cache to write to; by default the one that lmms-eval reads, `$LMMS_EVAL_DATASETS_CACHE` or else that of
            `datasets`.

    Returns:
        `dict[str, int]`: How many questions of each category were imported.

    Raises:
        QuestionDataError: If files are missing or malformed, images are missing or unreadable, or the cache cannot be
            written. The cache is then as it was.
    """
    rows, total = _open(source, image_dir)
    counts: Counter[str] = Counter()

    def numbered() -> Iterator[dict]:
        for index, row in enumerate(tqdm(rows, total=total, desc="Importing POPE")):
            counts[row["category"]] += 1
            yield {**row, "id": str(index)}

    write_to_cache(
        DATASET,
        {name: "image" if name == "image" else "string" for name in COLUMNS},
        numbered(),
        # The configuration without a name has the one split `test`, "Full" has a split for each category.
        lambda row: [("default", "test"), ("Full", row["category"])],
        cache_dir,
    )
    return dict(counts)


def _open(source: str | Path | Iterable[str | Path], image_dir: str | Path | None) -> tuple[Iterator[dict], int]:
    """Returns the rows of `source` and how many there are; images are checked before the first row comes."""
    paths = [Path(path).expanduser() for path in ([source] if isinstance(source, str | Path) else source)]
    for path in paths:
        if not path.exists():
            raise QuestionDataError(f"No such file or folder: {path}. Give POPE's question files or parquet files.")
    if len(paths) == 1 and paths[0].is_dir():
        folder = paths[0]
        if any((folder / _question_file(category)).is_file() for category in CATEGORIES):
            return _open_json(folder, image_dir)
        paths = sorted(folder.rglob("*.parquet"))
        if not paths:
            raise QuestionDataError(
                f"{folder} holds neither {', '.join(map(_question_file, CATEGORIES))} nor parquet files."
            )
    if image_dir is not None:
        raise QuestionDataError("`image_dir` goes with the JSON question files; parquet files bring their images.")
    return _open_parquet(paths)


def _question_file(category: str) -> str:
    return f"coco_pope_{category}.json"


def _open_json(folder: Path, image_dir: str | Path | None) -> tuple[Iterator[dict], int]:
    """Opens the official question files, one JSON object a line."""
    if absent := [name for name in map(_question_file, CATEGORIES) if not (folder / name).is_file()]:
        raise QuestionDataError(f"{folder} lacks {', '.join(absent)}; POPE's three files belong together.")
    if image_dir is None or not Path(image_dir).expanduser().is_dir():
        raise QuestionDataError(
            f"The image folder is {image_dir}; POPE's JSON files need the folder of the COCO val2014 images they name."
        )
    questions = []
    for category in CATEGORIES:
        path = folder / _question_file(category)
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                question = {
                    "question_id": str(entry["question_id"]),
                    "question": entry["text"],
                    "answer": entry["label"],
                    "image_source": entry["image"],
                    "category": category,
                }
                if not all(isinstance(value, str) for value in question.values()):
                    raise TypeError(f"{question} has values that are no texts")
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise QuestionDataError(
                    f"{path}, line {number}: expected a JSON object with question_id, image, text, label ({error!r})."
                ) from error
            questions.append(_checked(question, f"{path}, line {number}"))
    names = sorted({question["image_source"] for question in questions})
    remedy = "POPE's images are those of COCO val2014: complete the folder and import again."
    images = read_images(Path(image_dir).expanduser(), names, remedy)

    def rows() -> Iterator[dict]:
        for question in questions:
            image = {"bytes": images[question["image_source"]], "path": None}
            yield {**question, "image_source": Path(question["image_source"]).stem, "image": image}

    return rows(), len(questions)


def _checked(question: dict, where: str) -> dict:
    """Returns the question, or raises if its answer or category is none that POPE has."""
    if str(question["answer"]).strip().lower() not in ("yes", "no"):
        raise QuestionDataError(f"{where}: the answer is {question['answer']!r}; expected yes or no.")
    if question["category"] not in CATEGORIES:
        raise QuestionDataError(f"{where}: the category is {question['category']!r}; expected one of {CATEGORIES}.")
    return question


def _open_parquet(paths: list[Path]) -> tuple[Iterator[dict], int]:
    """Opens parquet files with the columns of the hub's data set, whichever categories they hold."""
    import pyarrow.parquet as pq

    needed = [column for column in COLUMNS if column != "id"]
    total = 0
    for path in paths:
        try:
            parquet = pq.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise QuestionDataError(f"{path} is no readable parquet file ({error}).") from error
        if absent := [column for column in needed if column not in parquet.schema_arrow.names]:
            raise QuestionDataError(f"{path} lacks the columns {absent}; it has {parquet.schema_arrow.names}.")
        total += parquet.metadata.num_rows

    def rows() -> Iterator[dict]:
        seen, decoded = set(), set()
        for path in paths:
            for batch in pq.ParquetFile(path).iter_batches(_ROWS_A_CHUNK, columns=needed):
                for row in batch.to_pylist():
                    key = (row["category"], row["question_id"])
                    _checked(row, f"{path}, question {key}")
                    if key in seen:
                        raise QuestionDataError(
                            f"{path}: question {key} comes twice. Give the files of one configuration only."
                        )
                    seen.add(key)
                    data = row["image"]["bytes"]
                    if row["image_source"] not in decoded:
                        if not data or not decodes(data):
                            raise QuestionDataError(f"{path}: the image of question {key} is missing or unreadable.")
                        decoded.add(row["image_source"])
                    yield {**row, "question_id": str(row["question_id"]), "image": {"bytes": data, "path": None}}

    return rows(), total
