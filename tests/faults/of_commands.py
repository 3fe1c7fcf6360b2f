"""Faults that meet the other commands: checkpoints, caches, results, questions, conversions."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deem_plugin.evaluation import imagenet
from deem_plugin.feedback.checkpoint import save_conditioner
from deem_plugin.feedback.conditioner import Conditioner
from deem_plugin.feedback.config import FeedbackConfig

from ..evaluation.helpers import robustvqa_rows, write_pope_files
from ..evaluation.mining_clip import save_mining_clip, write_pictures
from ..evaluation.runs import robustvqa_log, write_run
from .of_models import RunsCode
from .rows import Row, halved


def resumed(name, change, says, code=1, **settings):
    """A run of two steps that shall go on from its newest checkpoint, which was changed."""

    def argv(place):
        out = place.trained(place.folder / "out")
        change(out / "checkpoint-2")
        more = {"training__resume_from_checkpoint": "last", "training__max_steps": 3, **settings}
        return place.train(training__output_dir=out, **more)

    return Row(name, argv, says, code, slow=True)


def with_metadata(**fields):
    """Changes what a conditioner's file says of itself; a dictionary is laid over what is there."""

    def change(folder):
        path = folder / "feedback.safetensors"
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        for key, value in fields.items():
            if isinstance(value, dict):
                value = json.dumps(json.loads(metadata[key]) | value)
            metadata[key] = value
        save_file(load_file(path), path, {key: value for key, value in metadata.items() if value is not None})

    return change


def without_a_weight(folder):
    path = folder / "feedback.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    weights = load_file(path)
    weights.pop(sorted(weights)[0])
    save_file(weights, path, metadata)


def of_conditioner(name, change, says):
    """A checkpoint whose `feedback.safetensors` was changed."""

    def argv(place):
        folder = place.changed("llava", lambda folder: None)
        conditioner = Conditioner(32, 16, num_queries=4, resampler_dim=16, resampler_layers=1, resampler_heads=2)
        save_conditioner(conditioner, FeedbackConfig(), folder)
        change(folder)
        return ["reconstruct", folder, place.parts / "images/1.png", "--out", place.folder / "a.png"]

    return Row(name, argv, says)


def _conditioner(change):
    return lambda folder: change(folder / "feedback.safetensors")


CONDITIONERS = [
    of_conditioner("a conditioner cut in half", _conditioner(halved), "feedback.safetensors"),
    of_conditioner("an empty conditioner", _conditioner(lambda path: path.write_bytes(b"")), "feedback.safetensors"),
    of_conditioner("a pickle as conditioner", _conditioner(lambda path: torch.save([1], path)),
                   "feedback.safetensors"),
    of_conditioner("a conditioner without metadata", with_metadata(conditioner=None, feedback=None),
                   "feedback.safetensors"),
    of_conditioner("a conditioner of another kind", with_metadata(feedback=None), "feedback.safetensors"),
    of_conditioner("a conditioner of no JSON", with_metadata(conditioner="{"), "feedback.safetensors"),
    of_conditioner("a conditioner of a list", with_metadata(conditioner="[1]"), "feedback.safetensors"),
    of_conditioner("a conditioner of unknown arguments", with_metadata(conditioner={"width": 1}),
                   "feedback.safetensors"),
    of_conditioner("a conditioner of texts", with_metadata(conditioner={"input_dim": "a"}), "feedback.safetensors"),
    of_conditioner("a conditioner of 400 GB", with_metadata(conditioner={"context_dim": 10**11}),
                   "feedback.safetensors.*it asks for"),
    of_conditioner("a conditioner of a million layers", with_metadata(conditioner={"resampler_layers": 10**6}),
                   "feedback.safetensors.*it asks for"),
    of_conditioner("a conditioner of many queries", with_metadata(conditioner={"num_queries": 10**10}),
                   "feedback.safetensors.*it asks for"),
    of_conditioner("a conditioner of other settings", with_metadata(feedback="[]"), "feedback.safetensors"),
    of_conditioner("a conditioner that lacks a weight", without_a_weight, "feedback.safetensors"),
]  # fmt: skip


def compared(name, change, says, **options):
    """Two runs, the second of which was changed."""

    def argv(place):
        def run(part):
            return write_run(place.folder / part, {"robustvqa_a": robustvqa_log(robustvqa_rows(), answer)}, model=part)

        base, new = run("base"), run("new")
        change(new)
        return ["compare", base, new]

    return Row(name, argv, says, **options)


def answer(number, row):
    return "Yes."


def _log(change):
    return lambda run: change(next(run.rglob("*.jsonl")))


def _results(content):
    return lambda run: next(run.rglob("*_results.json")).write_bytes(content)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-50])


def _second(rows):
    return lambda run: write_run(run, {"robustvqa_a": robustvqa_log(rows, answer)}, model="new")


COMPARISONS = [
    compared("a log cut off", _log(_cut), r"samples_robustvqa_a.jsonl, line 6"),
    compared("a log in UTF-16", _log(lambda path: path.write_bytes(b"\xff\xfe" + path.read_bytes())),
             "samples_robustvqa_a.jsonl"),
    compared("an empty log", _log(lambda path: path.write_bytes(b"")), "samples_robustvqa_a.jsonl is empty"),
    compared("a log of lists", _log(lambda path: path.write_text("[1]\n")), "samples_robustvqa_a.jsonl, line 1"),
    compared("a deep log", _log(lambda path: path.write_text("[" * 100_000)), "samples_robustvqa_a.jsonl, line 1"),
    compared("a log of NaN", _log(lambda path: path.write_text('{"doc_id": NaN, "target": "", "filtered_resps": ""}')),
             "samples_robustvqa_a.jsonl, line 1"),
    compared("a log of infinity",
             _log(lambda path: path.write_text('{"doc_id": Infinity, "target": "", "filtered_resps": ""}')),
             "samples_robustvqa_a.jsonl, line 1"),
    compared("results that are a list", _results(b"[]"), "_results.json"),
    compared("results of lists", _results(b'{"results": [], "configs": [], "config": []}'), "_results.json"),
    compared("results in Latin-1", _results(b'{"\xe9": 1}'), "_results.json"),
    compared("results cut off", _results(b'{"results": {'), "_results.json"),
    compared("no results", lambda run: next(run.rglob("*_results.json")).unlink(), "_results.json is missing"),
    compared("other questions", _second([{**row, "caption": row["caption"] + "x"} for row in robustvqa_rows()]),
             "same data", lines=3),
    compared("fewer questions", _second(robustvqa_rows(images=2)), "same data", lines=3),
    Row("no runs", lambda place: ["compare", "/nowhere", "/nowhere"], "No such run directory: /nowhere"),
    Row("an empty run", lambda place: ["compare", place.empty(), place.folder], "empty holds no sample logs"),
]  # fmt: skip


def pope(name, change, says, images=True):
    """POPE's files, changed."""

    def argv(place):
        source = write_pope_files(place.folder / "pope")
        change(source)
        return ["data", "import", "pope", source, *(["--images", source / "images"] if images else [])]

    return Row(name, argv, says)


def _pope_file(content: bytes):
    return lambda source: (source / "coco_pope_random.json").write_bytes(content)


QUESTIONS = [
    pope("POPE lacks a picture", lambda source: (source / "images/COCO_1.jpg").unlink(), "COCO_1.jpg"),
    pope("POPE has a broken picture", lambda source: (source / "images/COCO_1.jpg").write_text("x"), "COCO_1.jpg"),
    pope("POPE without pictures", lambda source: None, "image folder is None", images=False),
    pope("POPE lacks a file", lambda source: (source / "coco_pope_random.json").unlink(),
         "lacks coco_pope_random.json"),
    pope("POPE in UTF-16", _pope_file(b"\xff\xfe"), "coco_pope_random.json"),
    pope("POPE of lists", _pope_file(b"[1]"), "coco_pope_random.json, line 1"),
    pope("POPE of deep lists", _pope_file(b"[" * 100_000), "coco_pope_random.json, line 1"),
    pope("POPE of another answer", _pope_file(b'{"question_id": 1, "text": "a", "label": "maybe", "image": "a"}'),
         "coco_pope_random.json, line 1.*maybe"),
    pope("POPE with a picture that is a number",
         _pope_file(b'{"question_id": 1, "text": "a", "label": "yes", "image": 3}'), "coco_pope_random.json, line 1"),
    Row("POPE in an empty folder", lambda place: ["data", "import", "pope", place.empty()], "empty holds neither"),
    Row("POPE nowhere", lambda place: ["data", "import", "pope", "/nowhere"], "No such file or folder: /nowhere"),
    Row("POPE of a text as parquet", lambda place: ["data", "import", "pope", place.file("a.parquet", "PAR1")],
        "a.parquet is no readable parquet"),
    Row("MMVP in an empty folder", lambda place: ["data", "import", "mmvp", place.empty()], "empty.*Questions.csv"),
    Row("MMVP in Latin-1", lambda place: ["data", "import", "mmvp", place.file("m/Questions.csv", b"\xe9").parent],
        "Questions.csv"),
]  # fmt: skip


def robustvqa(name, argv, says):
    """A build of RobustVQA."""

    def build(place):
        clip = place.folder / "mining"
        save_mining_clip(clip)
        return ["robustvqa", "build", "--clip", clip, "--out", place.folder / "out", *argv(place)]

    return Row(name, build, says)


def _pictures(place, classes=4):
    return write_pictures(place.folder / "A", imagenet.wnids()[:classes])


def _published(content):
    return lambda place: ["robustvqa", "check", place.file("a.json", content), "--imagenet-a", place.empty()]


ROBUSTVQA = [
    robustvqa("RobustVQA of nothing", lambda place: [], "Give at least one folder"),
    robustvqa("RobustVQA of no folder", lambda place: ["--imagenet-a", "/nowhere"], "No such folder: /nowhere"),
    robustvqa("RobustVQA of an empty folder", lambda place: ["--imagenet-a", place.empty()], "empty holds no picture"),
    robustvqa("RobustVQA of its parent", lambda place: ["--imagenet-a", _pictures(place).parent], "no class of"),
    robustvqa("RobustVQA to nowhere",
              lambda place: ["--imagenet-a", _pictures(place), "--out", "/proc/x"], "/proc/x"),
    Row("RobustVQA of no CLIP", lambda place: ["robustvqa", "build", "--clip", "/nowhere", "--out", place.folder / "o",
        "--imagenet-a", _pictures(place)], "'/nowhere'"),
    Row("published questions of a list", _published("[]"), r"a.json"),
    Row("published questions of no JSON", _published("{"), r"a.json"),
    Row("published questions in Latin-1", _published(b'{"\xe9": 1}'), r"a.json"),
    Row("published questions of numbers", _published({"imagenet_a": [1]}), r"a.json"),
    Row("published questions nowhere",
        lambda place: ["robustvqa", "check", "/nowhere.json", "--imagenet-a", place.empty()], "/nowhere.json"),
]  # fmt: skip


def _evil(place):
    path = place.folder / "evil.bin"
    torch.save({"a": RunsCode()}, path)
    return path


def _list(place):
    torch.save([1, 2], place.folder / "list.bin")
    return place.folder / "list.bin"


def _half(place):
    halved(_evil(place))
    return place.folder / "evil.bin"


def converted(name, make, says, model="llama"):
    return Row(
        name,
        lambda place: ["convert-official", make(place), place.folder / "out", "--language-model", place.parts / model],
        says,
    )


CONVERSIONS = [
    converted("a text as checkpoint", lambda place: place.file("a.bin", "text"), "a.bin cannot be read as weights"),
    converted("an empty folder as checkpoint", lambda place: place.empty(), "No weights at .*empty"),
    converted("another model as checkpoint", lambda place: place.parts / "llava/model.safetensors", "lacks"),
    converted("code as checkpoint", _evil, "evil.bin cannot be read as weights"),
    converted("half a checkpoint", _half, "evil.bin cannot be read as weights"),
    converted("a list as checkpoint", _list, "list.bin"),
]


def encoder(name, argv, says, code=1):
    return Row(name, lambda place: ["eval-encoder", place.parts / "clip", *argv(place)], says, code)


def _two_classes(place):
    place.file("dog/b.png", "no")
    (place.folder / "cat").mkdir()
    (place.folder / "cat/a.png").write_bytes((place.parts / "images/1.png").read_bytes())
    return ["--zero-shot", place.folder]


ENCODERS = [
    encoder("no classes", lambda place: ["--zero-shot", place.empty()], "empty has 0 subfolders"),
    encoder("no MMVP-VLM", lambda place: ["--mmvp-vlm", place.empty()], "empty.*Questions.csv"),
    encoder("nothing to evaluate on", lambda place: [], "Nothing to evaluate on"),
    encoder("a broken picture of a class", _two_classes, "b.png"),
    encoder("a batch of none", lambda place: [*_two_classes(place), "--batch-size", "0"], "--batch-size.*'0'",
            code=2),
    Row("a LLaVA as CLIP", lambda place: ["eval-encoder", place.parts / "llava", "--zero-shot", place.empty()],
        "llava is a model of type 'llava'"),
    Row("no CLIP", lambda place: ["eval-encoder", "/nowhere", "--zero-shot", place.empty()], "/nowhere"),
]  # fmt: skip


def reconstructed(name, argv, says, code=1):
    def reconstruct(place):
        return ["reconstruct", place.trained(place.folder / "run") / "final", *argv(place)]

    return Row(name, reconstruct, says, slow=True, code=code)


def _picture(place):
    return [place.parts / "images/1.png", "--out", place.folder / "a.png"]


RECONSTRUCTIONS = [
    reconstructed("a text as picture", lambda place: [place.file("a.png", "text")], "a.png"),
    reconstructed("no picture", lambda place: ["/nowhere.png"], "/nowhere.png"),
    reconstructed("no steps", lambda place: [*_picture(place), "--steps", "0"], "--steps.*'0'", code=2),
    reconstructed("an unknown ending of the output",
                  lambda place: [place.parts / "images/1.png", "--out", "a.xyz"], "xyz"),
    reconstructed("no such diffusion model",
                  lambda place: [*_picture(place), "--diffusion-model", "/nowhere"], "/nowhere"),
    Row("a checkpoint without conditioner",
        lambda place: ["reconstruct", place.parts / "llava", place.parts / "images/1.png"],
        "No feedback.safetensors in .*llava"),
]  # fmt: skip


def cached(name, says, change=lambda folder: None, code=1, slow=True):
    """A training from a latent cache that was changed."""

    def argv(place):
        from deem_plugin.cli import main

        latents = place.folder / "latents"
        command = place.train(feedback__diffusion_model__latent_cache=latents)
        if change:
            assert main(["cache-latents", *map(str, command[1:])]) == 0
            change(latents)
        return command

    return Row(name, argv, says, code, slow=slow)


CACHES = [
    cached("no latent cache", "There is no latent cache", None),
    cached("a cache cut off", "latents.* is damaged", lambda folder: halved(next(folder.glob("*.safetensors")))),
    cached("a cache with a broken manifest", "manifest.json is damaged",
           lambda folder: (folder / "manifest.json").write_text("{")),
    cached("a cache with a list as manifest", "manifest.json is damaged",
           lambda folder: (folder / "manifest.json").write_text("[]")),
    cached("a cache with half a file", "Saved",
           lambda folder: (folder / "x.safetensors.partial").write_bytes(b"half"), code=0),
    Row("no cache to fill", lambda place: ["cache-latents", *place.train(feedback=None)[1:]], "names no cache"),
    Row("a cache of a batch of none", lambda place: ["cache-latents", *place.train(
        feedback__diffusion_model__latent_cache=place.folder / "l")[1:], "--batch-size", "0"],
        "--batch-size.*'0'", code=2),
]  # fmt: skip


CPU = [f"training.{setting}" for setting in ("use_cpu=true", "bf16=false", "disable_tqdm=true")]


def denoiser(name, path, says, slow=False):
    def argv(place):
        images, out = path(place), f"training.output_dir={place.folder / 'out'}"
        base = ["train-denoiser", "tiny-denoiser", f"model.encoder={place.parts / 'clip'}", "training.max_steps=1"]
        return [*base, *CPU, out, f"data.path={images}"]

    return Row(name, argv, says, slow=slow)


def model_of(folder):
    halved(next(folder.glob("*.safetensors")))


def _cut_final(place):
    folder = place.trained(place.folder / "run") / "final"
    halved(folder / "model.safetensors")
    return folder


OTHERS = [
    Row(
        "a CLIP cut in half",
        lambda place: ["eval-encoder", place.changed("clip", model_of), *_two_classes(place)],
        "changed-clip",
    ),
    Row(
        "a language model nowhere",
        lambda place: [
            "convert-official",
            place.parts / "llava/model.safetensors",
            place.folder / "out",
            "--language-model",
            "/nowhere",
        ],
        "/nowhere|lacks",
    ),
    Row(
        "a model cut in half to reconstruct from",
        lambda place: ["reconstruct", _cut_final(place), *_picture(place)],
        "run/final",
        slow=True,
    ),
    Row(
        "a model cut in half to rank pictures by",
        lambda place: ["mismatch", _cut_final(place), place.parts / "images"],
        "run/final",
        slow=True,
    ),
    Row("no pictures to rank", lambda place: ["mismatch", place.parts / "llava", place.empty()], "llava|empty"),
    Row(
        "scores of before that are none",
        lambda place: [
            "eval-encoder",
            place.parts / "clip",
            *_two_classes(place),
            "--before",
            place.file("a.json", "[]"),
        ],
        "a.json|b.png",
    ),
    Row(
        "an adapter for an encoder",
        lambda place: [
            "train",
            "deem",
            *place.train(
                model__model="null", model__encoder=place.changed("clip", model_of), data__path=place.parts / "images"
            )[2:],
        ],
        "changed-clip",
    ),
    Row(
        "a tower cut in half",
        lambda place: place.train(model__vision_tower=f"deem:{place.changed('clip', model_of)}"),
        "changed-clip",
    ),
    Row(
        "a diffusion model without text encoder",
        lambda place: place.train(
            feedback__condition__prompt="a photo",
            feedback__diffusion_model__path=place.changed(
                "sd", lambda folder: __import__("shutil").rmtree(folder / "text_encoder")
            ),
        ),
        "changed-sd",
        slow=True,
    ),
    Row(
        "a plan of a broken config",
        lambda place: [
            "plan",
            *place.train(
                model__model=place.changed("llava", lambda folder: (folder / "config.json").write_text("[]"))
            )[1:],
        ],
        "changed-llava",
    ),
    denoiser("an empty folder of pictures", lambda place: place.empty(), "empty holds no picture"),
    denoiser("no folder of pictures", lambda place: "/nowhere", "/nowhere does not exist"),
    denoiser("a folder of texts", lambda place: place.file("p/a.png", "x").parent, "a.png cannot be read", slow=True),
    Row("a recipe that trains no denoiser", lambda place: ["train-denoiser", "tiny-tune"], "tiny-tune.*denoiser"),
    Row("a plan for an unknown GPU", lambda place: ["plan", *place.train()[1:], "--gpu", "h10"], "Unknown GPU 'h10'"),
    Row("a plan for no GPUs", lambda place: ["plan", *place.train()[1:], "--gpus", "0"], "--gpus.*'0'", code=2),
    Row("a plan of a missing model", lambda place: ["plan", *place.train(model__model="/nowhere")[1:]], "/nowhere"),
    Row("an evaluation of nothing", lambda place: ["eval", "/nowhere"], "/nowhere", slow=True),
]


def started_again(name, says, code=1, **settings):
    """A run into the folder of an earlier one."""
    return Row(
        name,
        lambda place: place.train(training__output_dir=place.trained(place.folder / "out"), **settings),
        says,
        code,
        slow=True,
    )


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
         "feedback.safetensors", "config.json", "manifest.json")  # fmt: skip
RESUMED = [
    *(resumed(f"a checkpoint with half of {name}", lambda folder, name=name: halved(folder / name),
              "checkpoint-2.*Resuming from .*checkpoint-1.*Saved", code=0) for name in FILES),
    resumed("a checkpoint without optimizer", lambda folder: (folder / "optimizer.pt").unlink(),
            "checkpoint-2.*optimizer.pt.*Resuming from .*checkpoint-1.*Saved", code=0),
    resumed("a checkpoint of code", lambda folder: torch.save({"a": RunsCode()}, folder / "optimizer.pt"),
            "checkpoint-2.*optimizer.pt.*Resuming from .*checkpoint-1.*Saved", code=0),
    started_again("a folder of another run", "overwrite_output_dir"),
    started_again("a finished run", "Saved", code=0, training__max_steps=2, training__resume_from_checkpoint="last"),
    resumed("a resumed run of another conditioner", lambda folder: None, "conditioner in .* made with",
            feedback__condition__num_queries=6),
    resumed("a resumed run of other data", lambda folder: None, "data|cannot go on", data__max_length=7),
]  # fmt: skip

ROWS = [*CONDITIONERS, *COMPARISONS, *QUESTIONS, *ROBUSTVQA, *CONVERSIONS, *ENCODERS, *RECONSTRUCTIONS, *CACHES,
        *OTHERS, *RESUMED]  # fmt: skip
