"""All that reads what users bring: for each reader files that are right, and how it reads one."""

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from ..tiny import CHAT_TEMPLATE, tiny_image, tiny_processor


@dataclass(frozen=True)
class Reader:
    """
    Args:
        seeds (`Callable`): Makes files that are right, in a folder that is there for its own.
        read (`Callable`): Reads one of a name in that folder.
    """

    seeds: Callable[[Path], list[bytes]]
    read: Callable[[Path, bytes], object]


def list_rows(listing) -> None:
    """Lists a data set as a table does, without its files."""
    import pyarrow
    from datasets import Features, List, Value

    from deem_plugin.data.tables import with_fate

    texts = List(Value("string"))
    fate = {"files": texts, "notes": texts, "left_out": Value("string"), "problem": Value("string")}
    features = Features(listing.columns | fate)
    for row in with_fate(listing.rows, listing.name, **listing.arguments):
        pyarrow.Table.from_pylist([features.encode_example(row)], schema=features.arrow_schema)


def _file(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def saved(image: Image.Image, suffix: str) -> bytes:
    file = io.BytesIO()
    image.save(file, Image.registered_extensions()[suffix])
    return file.getvalue()


def _picture(folder: Path, name="1.png", size=(32, 32)) -> bytes:
    return _file(folder, name, saved(tiny_image(1, size), Path(name).suffix)).read_bytes()


CONVERSATIONS = [
    {
        "id": 1,
        "image": "1.png",
        "conversations": [{"from": "human", "value": "<image>\nhi"}, {"from": "gpt", "value": "yes"}],
    },
    {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": "x"},
        ],
        "images": ["1.png"],
    },
    {
        "prompt": [{"role": "user", "content": "hi"}],
        "completion": [{"role": "assistant", "content": "a"}],
        "image": "1.png",
    },
]
DOCUMENTS = [
    {"parts": ["a", {"image": "1.png"}, "b"], "learn_from": 1},
    {"parts": [{"image": "1.png", "box": [1, 2, 30, 40]}, "b", {"image": "1.png", "points": [[1, 2], [3.5, 4]]}, "c"]},
    {"parts": [{"image": "1.png", "mask": "1.png"}, "b"]},
]


def _lines(values) -> bytes:
    return "\n".join(map(json.dumps, values)).encode()


def _read_conversations(suffix):
    def read(folder, content):
        from deem_plugin.data.conversations import list_conversations

        list_rows(list_conversations(_file(folder, f"data{suffix}", content), folder))

    return read


def _read_documents(folder, content):
    from deem_plugin.data.document_files import list_documents

    list_rows(list_documents(_file(folder, "data.jsonl", content), folder))


INFO = {"image_name": "x.png", "matched_text_index": 0, "matched_sim": 0.9}
MMC4 = {"text_list": ["a b", "c d"], "image_info": [INFO, {**INFO, "image_name": "y.png", "matched_text_index": 1}]}


def _tar(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def _shards(folder):
    picture = _picture(folder, size=(4, 4))
    document = json.dumps(MMC4).encode()
    caption = json.dumps({"caption": "a noise of noise"}).encode()
    return [
        _tar({"a/0.json": document, "a/0.x.png": picture, "a/0.y.png": picture}),
        _tar({"0.png": picture, "0.txt": b"a noise of noise"}),
        _tar({"0.png": picture, "0.json": caption}),
    ]


def _read_shards(folder, content):
    from random import Random

    from deem_plugin.data.shards import list_interleaved, list_pairs, list_pictures

    path = str(_file(folder, "a.tar", content))
    list_rows(list_interleaved(path, incomplete=True, keep_single=1.0))
    list_rows(list_pairs(path))
    listing = list_pictures(path)
    for row in listing.rows(**listing.arguments):
        listing.open(row, Random(0))


def _in_shard(content: bytes) -> bytes:
    picture = saved(tiny_image(1, (4, 4)), ".png")
    return _tar({"0.json": content, "0.x.png": picture, "0.y.png": picture})


COCO = {
    "images": [{"id": 1, "file_name": "1.png", "width": 32, "height": 32}],
    "categories": [{"id": 1, "name": "a_b"}],
    "annotations": [
        {"id": 7, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 9, 1, 9, 9]], "bbox": [1, 1, 5, 5]},
        {"id": 8, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]},
        {"id": 9, "image_id": 1, "category_id": 1, "segmentation": {"size": [32, 32], "counts": [10, 14, 1000]}},
        {"id": 10, "image_id": 1, "category_id": 1, "segmentation": {"size": [32, 32], "counts": ":>PO"}},
    ],
}
REFS = [{"ann_id": 7, "split": "train", "sentences": ["a", {"sent": "b"}]}]
GENOME = [
    {"regions": [{"region_id": 1, "image_id": 1, "x": 1, "y": 1, "width": 5, "height": 5, "phrase": "p"}]},
    {"image_id": 1, "url": "http://a/VG_100K/1.png", "width": 32, "height": 32},
]
VCR = {
    "objects": ["person", "dog"], "question": ["Is", [0], "a", [1], "?"], "answer_choices": [["Yes", "."], ["No"]],
    "answer_label": 0, "img_fn": "1.png", "metadata_fn": "1.json", "annot_id": "a",
}  # fmt: skip
VCR_PICTURE = {"segms": [[[[1, 1], [9, 1], [9, 9]]], []], "boxes": [[1, 1, 5, 5], [2, 2, 9, 9, 0.9]], "width": 32,
               "height": 32}  # fmt: skip


def _regions(folder):
    """Each seed holds all files of a source, one on each line."""
    _picture(folder)
    return [_lines([COCO]), _lines([COCO, REFS]), _lines([[GENOME[0]], [GENOME[1]]]), _lines([VCR, VCR_PICTURE])]


def _read_regions(folder, content):
    from deem_plugin.data.region_sets import list_regions

    first, _, second = content.partition(b"\n")
    a, b = _file(folder, "a.json", first), _file(folder, "b.json", second)
    lines, metadata = _file(folder, "a.jsonl", first), _file(folder, "1.json", second)
    sources = (
        {"format": "coco", "annotations": a},
        {"format": "refcoco", "instances": a, "refs": b},
        {"format": "visual_genome", "descriptions": a, "image_data": b},
        {"format": "vcr", "path": lines, "metadata_dir": metadata.parent},
    )
    for source in sources:
        source = {name: str(value) for name, value in source.items()} | {"image_dir": str(folder)}
        _tolerant(list_rows, list_regions(source))


def _tolerant(read, *arguments):
    """Reads on where a user's error was raised."""
    from deem_plugin.cli import is_for_the_user

    try:
        read(*arguments)
    except Exception as error:
        if not is_for_the_user(error):
            raise


# So that recipes for GPUs are read here.
CPU = [f"training.{setting}" for setting in ("use_cpu=true", "bf16=false", "tf32=null", "fsdp=null")]


def _recipes(folder):
    from deem_plugin.training.recipes import find_recipe, list_recipes

    return [find_recipe(name).read_bytes() for name in list_recipes()]


def _read_recipe(folder, content):
    from deem_plugin.training.recipes import load_recipe

    load_recipe(_file(folder, "given.yaml", content), CPU)


def _overrides(folder):
    from dataclasses import fields

    from deem_plugin.training.recipes import _classes

    keys = [f"{section}.{item.name}" for section, cls in _classes().items() for item in fields(cls)]
    values = (
        "1",
        "-1",
        "0.5",
        "true",
        "null",
        "abc",
        "[a, b]",
        "{a: 1}",
        ".nan",
        ".inf",
        "1e400",
        "'no'",
        "2020-01-01",
    )
    return [b"data.path=a.json", *(f"{key}={value}".encode() for key in keys for value in values)]


def _read_override(folder, content):
    from deem_plugin.training.recipes import load_recipe

    text = content.decode(errors="surrogateescape")
    load_recipe("tiny-tune", [*CPU, text])


def _run(folder, name):
    from ..evaluation.helpers import robustvqa_rows
    from ..evaluation.runs import robustvqa_log, write_run

    write_run(folder / name, {"robustvqa_a": robustvqa_log(robustvqa_rows(), lambda *_: "Yes.")}, model=name)
    return folder / name


def _seeds_of_runs(pattern):
    def seeds(folder):
        _run(folder, "base")
        _picture(folder, "plot.png")
        return [next(_run(folder, "new").rglob(pattern)).read_bytes()]

    return seeds


def _read_run(pattern):
    def read(folder, content):
        from deem_plugin.evaluation.compare import compare_runs
        from deem_plugin.evaluation.compare_report import to_html, to_json, to_markdown

        next((folder / "new").rglob(pattern)).write_bytes(content)
        comparisons = compare_runs(folder / "base", folder / "new")
        to_markdown(comparisons), json.dumps(to_json(comparisons)), to_html(comparisons, folder / "plot.png")

    return read


def _conditioners(folder):
    from deem_plugin.feedback.checkpoint import FILE_NAME, save_conditioner
    from deem_plugin.feedback.conditioner import Conditioner
    from deem_plugin.feedback.config import FeedbackConfig, RossConfig
    from deem_plugin.feedback.token_denoiser import TokenDenoiser

    seeds = []
    resampled = Conditioner(4, 4, num_queries=2, resampler_dim=4, resampler_layers=1, resampler_heads=2)
    token_denoiser = TokenDenoiser(4, 4, width=4, layers=1, heads=1)
    for conditioner, config in (
        (resampled, FeedbackConfig()),
        (Conditioner(4, 4, mlp=True, vector_dim=4, prompt_tokens=2), FeedbackConfig()),
        (token_denoiser, RossConfig()),
    ):
        save_conditioner(conditioner, config, folder)
        seeds.append((folder / FILE_NAME).read_bytes())
    return seeds


def _read_conditioner(folder, content):
    from deem_plugin.feedback.checkpoint import FILE_NAME, load_conditioner

    _file(folder, FILE_NAME, content)
    load_conditioner(folder)


def _manifests(folder):
    from deem_plugin.training.checkpoint import MANIFEST, write_manifest

    _file(folder, "model.safetensors", b"weights")
    write_manifest(folder)
    return [b" ".join((folder / MANIFEST).read_bytes().split())]


def _read_manifest(folder, content):
    from deem_plugin.training.checkpoint import MANIFEST, find_damage

    _file(folder, MANIFEST, content)
    find_damage(folder)


def _pictures(folder):
    names = ("1.png", "1.jpg", "1.webp", "1.gif", "1.bmp", "1.tiff")
    return [_picture(folder, name, (13, 9)) for name in names]


def _read_picture(folder, content):
    from deem_plugin.data.images import load_image, load_mask

    path = _file(folder, "x.png", content)
    _tolerant(load_mask, path)
    load_image(path)


def _templates(folder):
    from deem_plugin.resources import recipes_dir

    return [CHAT_TEMPLATE.encode(), *(path.read_bytes() for path in recipes_dir().glob("*.jinja"))]


def _read_template(folder, content):
    from deem_plugin.training.arguments import ModelArguments
    from deem_plugin.training.model import use_chat_template

    path = _file(folder, "given.jinja", content)
    use_chat_template(tiny_processor(), ModelArguments(model="x", chat_template=str(path)))


def _officials(folder):
    weights = {"visual_tokenizer.a.weight": torch.ones(2, 3), "mm_decoder.b": torch.ones(4)}
    save_file(weights, folder / "a.safetensors")
    torch.save(weights, folder / "a.bin")
    torch.save({"module": weights}, folder / "b.bin", _use_new_zipfile_serialization=False)
    return [(folder / name).read_bytes() for name in ("a.safetensors", "a.bin", "b.bin")]


def _read_official(folder, content):
    from deem_plugin.models.convert import load_official
    from deem_plugin.models.official_config import config_options

    for name in ("c.safetensors", "c.bin"):
        path = _file(folder, name, content)
        _tolerant(lambda path=path: config_options(load_official(path), 64))


def _popes(folder):
    from ..evaluation.helpers import write_pope_files

    return [(write_pope_files(folder / "pope") / "coco_pope_random.json").read_bytes()]


def _read_pope(folder, content):
    from deem_plugin.evaluation.pope import _open

    (folder / "pope/coco_pope_random.json").write_bytes(content)
    rows, _ = _open(folder / "pope", folder / "pope/images")
    list(rows)


MMVP = b"Index,Question,Options,Correct Answer\n" + b"".join(
    b"%d,Is it open or shut?,(a) Open (b) Shut,(a)\n" % number for number in range(1, 301)
)


def _read_mmvp(folder, content):
    from deem_plugin.evaluation.mmvp import _read_questions

    list(_read_questions(_file(folder, "Questions.csv", content)))


def _published(folder):
    from deem_plugin.evaluation import imagenet

    (folder / "A" / imagenet.wnids()[0]).mkdir(parents=True)
    _picture(folder / "A" / imagenet.wnids()[0])
    name = f"{imagenet.wnids()[0]}/1.png"
    return [_lines([{"imagenet_a": [{"file_name": name, "gt_caption": "tench", "error_caption": "goldfish"}]}])]


def _read_published(folder, content):
    from deem_plugin.evaluation.robustvqa_published import check_published

    check_published(_file(folder, "a.json", content), {"a": folder / "A"})


def _picture_beside(seeds):
    def make(folder):
        _picture(folder)
        return seeds

    return make


READERS = {
    "conversations": Reader(
        _picture_beside([json.dumps(CONVERSATIONS).encode(), json.dumps(CONVERSATIONS[:1] * 3).encode()]),
        _read_conversations(".json"),
    ),
    "conversations-lines": Reader(_picture_beside([_lines(CONVERSATIONS)]), _read_conversations(".jsonl")),
    "documents": Reader(_picture_beside([_lines(DOCUMENTS)]), _read_documents),
    "shards": Reader(_shards, _read_shards),
    "shard-records": Reader(
        lambda folder: [_lines([MMC4]), _lines([{"caption": "a noise of noise"}])],
        lambda folder, content: _read_shards(folder, _in_shard(content)),
    ),
    "regions": Reader(_regions, _read_regions),
    "recipes": Reader(_recipes, _read_recipe),
    "overrides": Reader(_overrides, _read_override),
    "results": Reader(_seeds_of_runs("*_results.json"), _read_run("*_results.json")),
    "logs": Reader(_seeds_of_runs("*.jsonl"), _read_run("*.jsonl")),
    "feedback": Reader(_conditioners, _read_conditioner),
    "manifest": Reader(_manifests, _read_manifest),
    "pictures": Reader(_pictures, _read_picture),
    "templates": Reader(_templates, _read_template),
    "official": Reader(_officials, _read_official),
    "pope": Reader(_popes, _read_pope),
    "mmvp": Reader(lambda folder: [MMVP], _read_mmvp),
    "published": Reader(_published, _read_published),
}
