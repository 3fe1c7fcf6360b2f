"""Faults of models: folders of VLMs and of diffusion models, whole, damaged and as downloaded."""

import json
import os
import shutil

import torch
from safetensors.torch import load_file, save_file

from ..tiny import tiny_unet
from .rows import Row, edited, halved

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n"


class RunsCode:
    """Runs code where it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch ran-code",)


def weights_of(folder):
    """Returns the one weights file of a folder."""
    return next(folder.glob("*.safetensors"))


def unload(folder):
    weights_of(folder).unlink()


def pickled(folder, name):
    unload(folder)
    torch.save({"a": RunsCode()}, folder / name)


def without(folder, part):
    """Leaves out one weight."""
    file = weights_of(folder)
    weights = load_file(file)
    weights.pop(next(name for name in weights if part in name))
    save_file(weights, file, {"format": "pt"})


def filled(folder, part, value):
    """Fills one weight."""
    file = weights_of(folder)
    weights = load_file(file)
    weights[next(name for name in weights if part in name)].fill_(value)
    save_file(weights, file, {"format": "pt"})


def diffusion_model(name, change, says="changed-sd", slow=True, **options):
    """A diffusion model's folder, read when the model is there and nothing has been trained."""
    return Row(
        name,
        lambda place: place.train(feedback__diffusion_model__path=place.changed("sd", change)),
        says,
        slow=slow,
        **options,
    )


def index(**fields):
    return lambda folder: edited(folder / "model_index.json", **fields)


def network(**fields):
    return lambda folder: edited(folder / "unet" / "config.json", **fields)


def unet_file(content: bytes):
    return lambda folder: weights_of(folder / "unet").write_bytes(content)


def _index(content):
    return lambda folder: (folder / "model_index.json").write_text(content)


def _unindexed_vae(folder):
    content = json.loads((folder / "model_index.json").read_text())
    del content["vae"]
    (folder / "model_index.json").write_text(json.dumps(content))


def _unclip(folder):
    unet = tiny_unet(class_embed_type="projection", projection_class_embeddings_input_dim=8)
    unet.save_pretrained(folder / "unet")


def _as_fp16(folder):
    for part in ("unet", "vae"):
        file = weights_of(folder / part)
        file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))


def _as_bin(folder):
    for part in ("unet", "vae"):
        file = weights_of(folder / part)
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()


DIFFUSION_MODELS = [
    diffusion_model("no model_index.json", lambda folder: (folder / "model_index.json").unlink(), "changed-sd", False),
    diffusion_model("a broken index", _index('{"a":'), "changed-sd.*model_index.json"),
    diffusion_model("an index in Latin-1", lambda folder: (folder / "model_index.json").write_bytes(b'{"\xe9": 1}'),
                    "changed-sd.*model_index.json"),
    diffusion_model("an index that is a list", _index("[1]"), "changed-sd.*model_index.json"),
    diffusion_model("an index that is null", _index("null"), "changed-sd.*model_index.json"),
    diffusion_model("an empty index", _index("{}"), "changed-sd.*Known networks"),
    diffusion_model("a unet that is a text", index(unet="UNet2DConditionModel"), "changed-sd"),
    diffusion_model("a unet that is a number", index(unet=3), "changed-sd"),
    diffusion_model("a unet that is a function", index(unet=["os", "system"]), "changed-sd.*system.*Known networks"),
    diffusion_model("a vae that is a class", index(vae=["subprocess", "Popen"]), "changed-sd.*Popen.*expected one of"),
    diffusion_model("a scheduler of numbers", index(scheduler=[1, 2]), "changed-sd.*scheduler"),
    diffusion_model("an unCLIP", _unclip, "unCLIP"),
    diffusion_model("a unet of another width", network(cross_attention_dim=24), "changed-sd"),
    diffusion_model("a unet of unknown blocks", network(down_block_types=["X", "Y"]), "changed-sd.*X"),
    diffusion_model("a unet without size", network(sample_size=None), "changed-sd.*sample_size"),
    Row("a unet without size, for pictures of 32 pixels",
        lambda place: place.train(feedback__diffusion_model__path=place.changed("sd", network(sample_size=None)),
                                  feedback__diffusion_model__image_size=32), "Saved", code=0, slow=True),
    diffusion_model("a unet of a pair of sizes", network(sample_size=[16, 16]), "Saved", code=0),
    diffusion_model("a unet of an oblong size", network(sample_size=[16, 24]), "changed-sd.*sample_size"),
    diffusion_model("a unet's config is a list", lambda folder: (folder / "unet/config.json").write_text("[]")),
    diffusion_model("a unet without config", lambda folder: (folder / "unet/config.json").unlink()),
    diffusion_model("a unet without weights", lambda folder: unload(folder / "unet")),
    diffusion_model("a unet cut in half", lambda folder: halved(weights_of(folder / "unet"))),
    diffusion_model("a vae cut in half", lambda folder: halved(weights_of(folder / "vae"))),
    diffusion_model("a web page as unet", unet_file(b"<html>")),
    diffusion_model("a unet with a huge header", unet_file(b"\xff" * 8 + b"{}")),
    diffusion_model("a pointer as unet", unet_file(POINTER.encode())),
    diffusion_model("an empty file as unet", unet_file(b"")),
    diffusion_model("a pickle as unet", lambda folder: pickled(folder / "unet", "diffusion_pytorch_model.bin")),
    diffusion_model("half precision as downloaded", _as_fp16, "Saved", code=0),
    diffusion_model(".bin alone as downloaded", _as_bin, "changed-sd.*(bin|safetensors)"),
    diffusion_model("no vae in the index", _unindexed_vae, "changed-sd.*(autoencoder|vae)"),
    diffusion_model("a vae that is null", index(vae=[None, None]), "changed-sd.*(autoencoder|vae|channels)"),
    diffusion_model("no scheduler", lambda folder: shutil.rmtree(folder / "scheduler")),
    diffusion_model("a scheduler that is a list",
                    lambda folder: (folder / "scheduler/scheduler_config.json").write_text("[]")),
    diffusion_model("an unknown prediction type",
                    lambda folder: edited(folder / "scheduler/scheduler_config.json", prediction_type="banana"),
                    "banana"),
    diffusion_model("weights that are NaN", lambda folder: filled(folder / "unet", "conv_in.weight", float("nan")),
                    "not finite|NaN|nan"),
    Row("an empty folder as diffusion model",
        lambda place: place.train(feedback__diffusion_model__path=place.empty()), "empty.*model_index.json",
        slow=True),
]  # fmt: skip


def model(name, change, says="changed-llava", slow=False, **options):
    """A VLM's folder."""
    return Row(
        name, lambda place: place.train(model__model=place.changed("llava", change), feedback=None), says,
        slow=slow, **options,
    )  # fmt: skip


def _processor_gone(folder):
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)


def _foreign_code(folder):
    edited(folder / "config.json", auto_map={"AutoConfig": "evil.C"}, model_type="evil")
    (folder / "evil.py").write_text("open('ran-code', 'w')\nclass C: pass\n")


def _template(text):
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


def given_template(name, content, says):
    return Row(name, lambda place: place.train(model__chat_template=place.file("given.jinja", content)), says)


MODELS = [
    model("a model cut in half", lambda folder: halved(folder / "model.safetensors"), "`model.model: .*changed-llava"),
    model("a model without weights", unload, "`model.model: .*changed-llava"),
    model("an empty file as model", lambda folder: (folder / "model.safetensors").write_bytes(b""), "`model.model"),
    model("a web page as model", lambda folder: (folder / "model.safetensors").write_text("<html>"), "`model.model"),
    model("a pickle as model", lambda folder: pickled(folder, "pytorch_model.bin"), "`model.model: .*changed-llava"),
    model("a model without processor", _processor_gone, "`model.model: .*changed-llava"),
    model("a model without config", lambda folder: (folder / "config.json").unlink(), "`model.model: .*changed-llava"),
    model("a config that is a list", lambda folder: (folder / "config.json").write_text("[]"), "`model.model"),
    model("a config in Latin-1", lambda folder: (folder / "config.json").write_bytes(b'{"\xe9": 1}'), "`model.model"),
    model("a config of another width", lambda folder: edited(folder / "config.json", text_config={"hidden_size": 3}),
          "`model.model: .*changed-llava"),
    model("a tokenizer that is a list", lambda folder: (folder / "tokenizer.json").write_text("[]"), "`model.model"),
    model("a model of foreign code", _foreign_code, "`model.model: .*changed-llava"),
    model("a model that lacks a weight", lambda folder: without(folder, "projector"), "projector.*Saved",
          code=0, slow=True),
    model("a model with NaN", lambda folder: filled(folder, "projector", float("nan")),
          "not finite|NaN|nan", slow=True),
    model("a template of foreign code", _template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
          "chat template.*unsafe"),
    model("a model's broken template", _template("{% for m in messages %}"), "chat template"),
    given_template("a broken template", "{% for m in messages %}{{ m.x }}",
                   "chat template.*given.jinja.*(endfor|tags)"),
    given_template("a template that fails", "{{ messages[99].content.x.y }}", "chat template"),
    given_template("a template that says nothing", "", "chat template"),
    given_template("a template without end", "{% for i in range(10**9) %}a{% endfor %}", "chat template"),
    given_template("a template in Latin-1", b"\xe9", "chat template.*given.jinja"),
    Row("a model is missing", lambda place: place.train(model__model="/nowhere/llava"),
        "`model.model: /nowhere/llava"),
    Row("a model is a file", lambda place: place.train(model__model=place.file("a", "a")), "`model.model: "),
    Row("a CLIP as VLM", lambda place: place.train(model__model=place.parts / "clip"), "`?model.model.*clip"),
    Row("a language model as VLM", lambda place: place.train(model__model=place.parts / "llama"),
        "model.model.*llama"),
    Row("a text as encoder", lambda place: place.train(recipe="deem", model__encoder=place.parts / "llama",
        model__model="null", data__path=place.parts / "images"), "model.encoder.*llama"),
]  # fmt: skip


def interleaved(name, says, **settings):
    """A DEEM, of which a part is missing."""

    def argv(place):
        documents = place.file("data.jsonl", {"parts": ["a noise", {"image": "1.png"}]})
        parts = {"language_model": place.parts / "llama", "vision_tower": f"deem:{place.parts / 'clip'}"}
        tiny = {f"model__{part}": path for part, path in parts.items()} | {"deem__denoiser": place.parts / "sd"}
        tiny |= {"model__model": "null", "data__path": documents, **settings}
        return [
            part for part in place.train(recipe="deem-tiny-pretrain", feedback=None, **tiny) if part != "feedback=null"
        ]

    return Row(name, argv, says)


DEEMS = [
    interleaved("a DEEM without language model", "`model.language_model: /nowhere`", model__language_model="/nowhere"),
    interleaved("a DEEM without diffusion model", "`/nowhere`.*model_index.json", deem__denoiser="/nowhere"),
    interleaved("a DEEM without encoder", "/nowhere", model__vision_tower="deem:/nowhere"),
    interleaved("a DEEM that is missing", "`model.model: /nowhere`", model__model="/nowhere",
                model__language_model="null", model__vision_tower="null"),
]  # fmt: skip

ROWS = [*DIFFUSION_MODELS, *MODELS, *DEEMS]
