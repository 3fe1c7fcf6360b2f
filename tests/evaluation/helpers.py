"""What the tests of this room share: tiny question sets, and requests as lmms-eval makes them."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

from deem_plugin.evaluation.details import write_details
from deem_plugin.evaluation.mmvp import CORRECTIONS, NUM_QUESTIONS
from deem_plugin.evaluation.pope import CATEGORIES
from deem_plugin.evaluation.robustvqa import SPLITS, write_robustvqa
from deem_plugin.evaluation.run import run_lmms_eval

from ..tiny import tiny_image


def robustvqa_rows(split: str = "a", images: int = 3) -> list[dict]:
    """Makes the two questions of each of some random pictures."""
    return [
        {
            "question_id": f"{split}-{index}-{answer}",
            "image_id": f"{split}-{index}",
            "image": tiny_image(index),
            "caption": caption,
            "answer": answer,
            "source": f"{split}/{index}.png",
        }
        for index in range(images)
        for answer, caption in (("yes", "tabby"), ("no", "wall_clock"))
    ]


def details_rows(images: int = 2) -> list[dict]:
    """Makes a pair of questions in each of two categories for each of some random pictures."""
    return [
        {
            "question_id": f"{index}-{category}-{answer}",
            "image_id": str(index),
            "image": tiny_image(index),
            "question": f"Is it {category}{'' if answer == 'yes' else ' or something else entirely'}? Yes or no?",
            "category": category,
            "answer": answer,
        }
        for index in range(images)
        for category in ("left", "big")
        for answer in ("yes", "no")
    ]


def write_pope_files(folder: Path, images: int = 2) -> Path:
    """Writes POPE's three question files and the pictures they name, in `folder / "images"`."""
    (folder / "images").mkdir(parents=True)
    for index in range(images):
        tiny_image(index).save(folder / "images" / f"COCO_{index}.jpg")
    for category in CATEGORIES:
        lines = [
            {"question_id": number + 1, "image": f"COCO_{number // 2}.jpg", "text": "Is there a dog in the image?"}
            for number in range(2 * images)
        ]
        lines = [{**line, "label": "no" if line["question_id"] % 2 else "yes"} for line in lines]
        (folder / f"coco_pope_{category}.json").write_text("\n".join(map(json.dumps, lines)))
    return folder


def write_mmvp_files(folder: Path) -> Path:
    """Writes MMVP as published, wrong labels included, with random pictures."""
    (folder / "MMVP Images").mkdir(parents=True)
    lines = ["lndex,Question,Options,Correct Answer"]
    for number in range(1, NUM_QUESTIONS + 1):
        tiny_image(number, (8, 8)).save(folder / "MMVP Images" / f"{number}.jpg")
        _, word = CORRECTIONS.get(number, ("", "it"))
        lines.append(f"{number},Is {word} open or shut?,(a) Open (b) Shut,{'(a)' if number % 2 else '(b)'}")
    (folder / "Questions.csv").write_text("\n".join(lines))
    return folder


def write_all_questions(home: Path) -> Path:
    """Writes RobustVQA's three files and the details file where `DEEM_HOME=home` makes the tasks look."""
    for split in SPLITS:
        write_robustvqa(robustvqa_rows(split), home / "robustvqa" / f"robustvqa_{split}.parquet")
    write_details(details_rows(), home / "details" / "details.parquet")
    return home


def offline_env(folder: Path) -> dict[str, str]:
    """Returns the environment of a process that has no network and caches below `folder`."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}


def evaluated(model_args: dict, tasks: str, out: Path, *, model: str = "deem", env=None, more=(), **options) -> dict:
    """Runs lmms-eval; `options` are those of its arguments that have a value, `more` are other arguments."""
    options = {"model": model, "model_args": ",".join(f"{k}={v}" for k, v in model_args.items()), **options}
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return run_lmms_eval(["--tasks", tasks, "--output_path", str(out), *arguments, *more], env=env)


def request(*args) -> SimpleNamespace:
    """Makes a request: the classes under test read nothing of lmms-eval's but its arguments."""
    return SimpleNamespace(args=args)
