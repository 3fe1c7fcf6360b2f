"""The same checkpoint through `deem` and through lmms-eval's own `llava_hf`: the same answers and scores."""

import json

import pytest
import torch

from deem_plugin.data.tokens import tokenize
from deem_plugin.evaluation.chats import read_messages
from deem_plugin.evaluation.mmvp import import_mmvp
from deem_plugin.evaluation.pope import import_pope
from deem_plugin.evaluation.pope_task import INSTRUCTION

from ..tiny import tiny_image, tiny_llava
from .helpers import evaluated, offline_env, write_mmvp_files, write_pope_files

# What the model says of POPE's two pictures. The stock task takes the one for an answer and not the other.
SAYS = ("yes", "Yes, there is a dog.")


@torch.no_grad()
def made_to_say(model, processor) -> None:
    """Sets the head of a tiny LLaVA so that it says one of `SAYS` by the picture and ends: scores are not all zero."""
    tokenizer = processor.tokenizer
    tokenizer.add_tokens(list(SAYS))
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    images = [[tiny_image(index)] for index in range(len(SAYS))]
    parts = [
        {"type": "image", "url": images[0][0]},
        {"type": "text", "text": f"Is there a dog in the image?{INSTRUCTION}"},
    ]
    prompt = read_messages([{"role": "user", "content": parts}], "pope", 0).render(processor)
    inputs, _ = tokenize(processor, [prompt] * len(images), images)
    hidden = model(**inputs, output_hidden_states=True).hidden_states[-1][:, -1]  # (pictures, width)
    # What tells the pictures apart, and a direction in which no prompt points: an answer, which ends the sequence.
    mean, toward = hidden.mean(0), hidden[0] - hidden[1]
    toward -= (toward @ mean) / (mean @ mean) * mean
    away = torch.linalg.svd(hidden).Vh[-1]
    model.lm_head.weight.zero_()
    yes, sentence = tokenizer.convert_tokens_to_ids(list(SAYS))
    model.lm_head.weight[[yes, sentence, tokenizer.eos_token_id]] = torch.stack([toward, -toward, away])
    model.get_input_embeddings().weight[[yes, sentence]] = 100 * away


@pytest.mark.slow
def test_stock_tasks_get_the_answers_and_scores_of_lmms_evals_own_llava(tmp_path):
    model, processor = tiny_llava()
    pope = write_pope_files(tmp_path / "pope")
    for index in range(len(SAYS)):  # lossless, as the model has seen them
        tiny_image(index).save(pope / "images" / f"COCO_{index}.jpg", format="PNG")
    made_to_say(model, processor)
    model.save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    import_pope(pope, pope / "images", tmp_path / "hf" / "datasets")
    import_mmvp(write_mmvp_files(tmp_path / "mmvp"), tmp_path / "hf" / "datasets")
    # llava_hf imports a reader of videos, of which there are none here.
    (tmp_path / "stubs").mkdir()
    (tmp_path / "stubs" / "decord.py").write_text("VideoReader = cpu = None\n")
    env = {**offline_env(tmp_path), "PYTHONPATH": str(tmp_path / "stubs")}
    model_args = {"pretrained": tmp_path / "llava", "device": "cpu"}

    reports, logs = {}, {}
    for name, more in (("llava_hf", {"device_map": "cpu"}), ("deem", {})):
        options = {"model": name, "env": env, "batch_size": 1 if more else 3, "limit": 8}
        reports[name] = evaluated(model_args | more, "pope,deem_pope,mmvp", tmp_path / name, **options)["results"]
        for path in sorted((tmp_path / name).rglob("*_samples_*.jsonl")):
            rows = sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["doc_id"])
            task = path.name.split("_samples_")[1]
            # Only some of lmms-eval's models count tokens.
            logs[name, task] = [{key: row[key] for key in row if key != "token_counts"} for row in rows]

    assert reports["deem"] == reports["llava_hf"]
    tasks = ("pope.jsonl", "deem_pope.jsonl", "mmvp.jsonl")
    for task in tasks:
        assert logs["deem", task] == logs["llava_hf", task] and len(logs["deem", task]) == 8
    assert {row["filtered_resps"] for row in logs["deem", "pope.jsonl"]} == set(SAYS)
    # Labels alternate: the one word is right half of the time, the sentence never; our task reads both.
    assert reports["deem"]["pope"]["pope_accuracy,none"] == 0.25
    assert reports["deem"]["deem_pope"]["deem_pope_accuracy,none"] == 0.5
