"""
The recipes on families that people fine-tune: trained on pictures of mixed sizes, saved, reloaded by the stock class,
reconstructed, and evaluated through lmms-eval; every step by the files that a published checkpoint has.
"""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from deem_plugin.data.collator import IGNORE_INDEX, ConversationCollator
from deem_plugin.evaluation.details import write_details
from deem_plugin.evaluation.reconstruction import reconstruct_files
from deem_plugin.evaluation.run import evaluate
from deem_plugin.training.arguments import ModelArguments
from deem_plugin.training.cache import cache_latents
from deem_plugin.training.model import make_model
from deem_plugin.training.recipes import load_recipe
from deem_plugin.training.run import train
from deem_plugin.vision.towers import find_tower

from ..evaluation.helpers import offline_env
from ..families.builders import picture
from ..tiny import tiny_sd_folder
from .checkpoints import ANSWER, CHECKPOINTS, QUESTION, write_checkpoint
from .helpers import tiny_overrides

# Width and height of the pictures of each conversation.
CONVERSATIONS = [
    [(64, 64)],
    [(128, 40), (40, 100)],
    [],
    [(150, 110)],
    [(32, 96)],
    [(96, 64), (64, 64)],
    [],
    [(70, 70)],
]


def conversations(folder):
    """Makes a conversation with each list of pictures; every other one has a second turn."""
    made = []
    for index, sizes in enumerate(CONVERSATIONS):
        files = [folder / f"{index}-{place}.png" for place in range(len(sizes))]
        turns = ["<image>\n" * len(sizes) + QUESTION, ANSWER] + [f"And é {index}?", "It is 1."] * (index % 2)
        roles = ["user", "assistant"] * 2
        messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
        made.append({"messages": messages, "images": [str(file) for file in files]})
        for place, (size, file) in enumerate(zip(sizes, files, strict=True)):
            picture(*size, 10 * index + place)[0].save(file)
    return made


def slow_but(name, quick=("qwen3_vl", "mllama", "gemma3")):
    """Marks all families but a few as slow."""
    return name if name in quick else pytest.param(name, marks=pytest.mark.slow)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Gives the folder of a family by name: a tiny checkpoint, conversations and a diffusion model."""
    made = {}

    def make(name):
        if name == "smolvlm":
            pytest.importorskip("num2words")  # of which its processor makes numbers
        if name not in made:
            folder = made[name] = tmp_path_factory.mktemp(name)
            write_checkpoint(name, folder / "model")
            tiny_sd_folder(folder / "sd")
            (folder / "images").mkdir()
            (folder / "data.jsonl").write_text("\n".join(map(json.dumps, conversations(folder / "images"))))
        return made[name]

    return make


def recipe_of(folder, out, **settings):
    """The recipe for Qwen3-VL on another family's checkpoint, trained in full."""
    stand_ins = {
        "model__model": folder / "model",
        "data__path": folder / "data.jsonl",
        "model__lora__r": 0,
        **settings,
    }
    recipe = load_recipe("qwen3-vl-feedback-lora", tiny_overrides(folder, out, **stand_ins | settings))
    recipe.model.learning_rates = {"@tower": 1e-3, "feedback_conditioner": 1e-3}
    return recipe


def records(folder):
    return [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]


def losses(out):
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [(row["loss"], row["feedback_loss"]) for row in history if "feedback_loss" in row]


@pytest.mark.parametrize("name", map(slow_but, CHECKPOINTS))
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_answers_are_learned_with_their_end_of_turn_beside_any_other_conversation(checkpoint, name, side):
    folder, case = checkpoint(name), CHECKPOINTS[name]
    processor = AutoProcessor.from_pretrained(folder / "model")
    processor.tokenizer.padding_side = side
    collate, examples = ConversationCollator(processor), records(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder / "model").eval()

    batch = collate(examples)

    end = case.turn_end or case.eos
    with torch.no_grad():
        logits = model(**batch).logits
    for index, example in enumerate(examples):
        alone = collate([example])
        length = alone["input_ids"].shape[1]
        for key in ("input_ids", "labels"):
            assert alone[key][0].equal(batch[key][index, :length])
        learned = processor.tokenizer.decode(alone["labels"][alone["labels"] != IGNORE_INDEX]).replace(f"{end} ", end)
        answers = [turn["content"] for turn in example["messages"] if turn["role"] == "assistant"]
        assert learned.strip() == end.join([*answers, ""])
        if name != "mllama":  # attends to the pixels of padding wherever a token has no image before it
            with torch.no_grad():
                torch.testing.assert_close(model(**alone).logits[0], logits[index, :length], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", map(slow_but, CHECKPOINTS))
def test_all_that_the_language_model_reads_of_the_tower_trains_and_nothing_else(checkpoint, name):
    folder = checkpoint(name)
    model, processor = make_model(ModelArguments(model=str(folder / "model"), dtype="float32"))
    plain = AutoModelForImageTextToText.from_pretrained(folder / "model")
    batch = ConversationCollator(processor)(records(folder))

    plain(**batch).loss.backward()

    read = {name for name, value in find_tower(plain).named_parameters() if value.grad is not None}
    trained = {name for name, value in find_tower(model).named_parameters() if value.requires_grad}
    assert trained == read
    if name == "qwen3_vl":  # DeepStack
        assert read == {name for name, _ in find_tower(plain).named_parameters()}
        assert any("deepstack_merger_list.1." in name for name in trained)
    outside = set(find_tower(model).parameters())
    assert all(value.requires_grad for value in model.parameters() if value not in outside)


@pytest.fixture(scope="session")
def trained(checkpoint, tmp_path_factory):
    """Gives by name what a family's checkpoint has become by two steps of training."""
    made = {}

    def make(name):
        folder = checkpoint(name)
        if name not in made:
            made[name] = train(recipe_of(folder, tmp_path_factory.mktemp(f"{name}-out")))
        return made[name]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_trained_family_reloads_as_its_stock_class_with_all_that_should_have_moved(checkpoint, trained, name):
    start, final = checkpoint(name) / "model", trained(name)
    stock = AutoModelForImageTextToText.from_pretrained(start)
    before = find_tower(stock).state_dict()
    ready = find_tower(make_model(ModelArguments(model=str(start), dtype="float32"))[0])

    model, info = type(stock).from_pretrained(final, output_loading_info=True)

    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    history = losses(final.parent)
    assert len(history) == 2 and all(value > 0 for row in history for value in row)
    frozen = {name for name, value in ready.named_parameters() if not value.requires_grad}
    for key, value in find_tower(model).named_parameters():
        if key in frozen:
            assert value.equal(before[key]), key
        elif "k_proj.bias" not in key:  # shifts all of a query's scores alike, so that its gradient is rounding
            assert not value.equal(before[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_vl", "smolvlm", "mllama"])
def test_lora_on_language_model_and_tower_is_merged_into_the_stock_class(checkpoint, name, tmp_path):
    folder = checkpoint(name)
    recipe = recipe_of(folder, tmp_path, model__lora__r=2)
    recipe.model.learning_rates = {"feedback_conditioner": 1e-3}

    model, info = AutoModelForImageTextToText.from_pretrained(train(recipe), output_loading_info=True)

    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    before = AutoModelForImageTextToText.from_pretrained(folder / "model")
    for after, start in ((find_tower(model), find_tower(before)), (model.get_decoder(), before.get_decoder())):
        start = start.state_dict()
        assert any(not value.equal(start[key]) for key, value in after.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_trained_family_is_reconstructed(checkpoint, trained, name, tmp_path):
    pictures = sorted((checkpoint(name) / "images").glob("*.png"))[:2]

    reconstruct_files(trained(name), pictures, tmp_path / "seen.png", steps=2)

    assert Image.open(tmp_path / "seen.png").width == 2 * 128 + 8


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_trained_family_answers_through_lmms_eval(checkpoint, trained, name, tmp_path):
    rows = [
        {
            "question_id": f"{index}-{answer}",
            "image_id": str(index),
            "image": Image.open(file),
            "question": f"Is it {answer}? Answer yes or no.",
            "category": "colour",
            "answer": answer,
        }
        for index, file in enumerate(sorted((checkpoint(name) / "images").glob("*.png"))[:2])
        for answer in ("yes", "no")
    ]
    write_details(rows, tmp_path / "details" / "details.parquet")
    env = {**offline_env(tmp_path), "DEEM_DETAILS": str(tmp_path / "details")}
    arguments = ["--tasks", "deem_details", "--output_path", str(tmp_path / "out"), "--batch_size", "3"]

    results = evaluate(trained(name), [*arguments, "--model_args", "device=cpu"], env=env)

    assert results["n-samples"]["deem_details"]["effective"] == 4
    log = next((tmp_path / "out").rglob("*_samples_deem_details.jsonl")).read_text().splitlines()
    rows = [json.loads(line) for line in log]
    # Random weights may end an answer at once, so that it is empty.
    assert len(rows) == 4 and all(isinstance(row["filtered_resps"], str) for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_vl", "smolvlm"])
def test_a_family_trains_from_its_latent_cache_as_without(checkpoint, name, tmp_path):
    folder, settings = checkpoint(name), {"feedback__diffusion_model__latent_cache": tmp_path / "cache"}

    counts = cache_latents(recipe_of(folder, tmp_path / "fill", **settings), batch_size=3)
    train(recipe_of(folder, tmp_path / "plain"))
    train(recipe_of(folder, tmp_path / "cached", **settings))

    assert counts.known == 0 and counts.new >= sum(map(len, CONVERSATIONS))
    assert len(losses(tmp_path / "plain")) == 2
    for expected, given in zip(losses(tmp_path / "plain"), losses(tmp_path / "cached"), strict=True):
        assert given == pytest.approx(expected, rel=1e-5)
