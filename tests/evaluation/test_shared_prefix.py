"""Questions about the same pictures share one prefill: the same answers as alone, in any order, or the plain path."""

import logging
import random

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, MistralConfig

from deem_plugin.evaluation.lmms import DeemChat, DeemSimple
from deem_plugin.evaluation.shared_prefix import SharedPrefix

from ..tiny import tiny_clip_config, tiny_image, tiny_llava
from .helpers import request

GREEDY = {"max_new_tokens": 4, "temperature": 0, "do_sample": False, "until": ["\n\n"]}
# Pictures of each document: some alone, some in company, some in no picture's.
PICTURES = [[0], [0], [1, 0], [], [1], [2], [1, 0], [], [0], [2], [1, 0]]


@torch.no_grad()
def attentive(model):
    """Makes attention pick among the tokens: with that of tiny weights, answers hardly depend on the picture."""
    for name, weight in model.model.language_model.named_parameters():
        if "self_attn" in name:
            weight *= 10
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    model, processor = tiny_llava()
    attentive(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def windowed(checkpoint, tmp_path_factory):
    """The same with a language model that sees the last 24 tokens, fewer than prompts have."""
    folder = tmp_path_factory.mktemp("windowed")
    model, processor = tiny_llava()
    text = model.config.text_config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    mistral = MistralConfig(**{name: getattr(text, name) for name in names}, num_key_value_heads=1, sliding_window=24)
    config = LlavaConfig(
        vision_config=tiny_clip_config(), text_config=mistral, image_token_index=model.config.image_token_id
    )
    torch.manual_seed(0)
    attentive(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def documents(order=None):
    """Documents as a data set gives them: each with pictures of its own, some of which look alike."""
    docs = [
        {"images": [tiny_image(seed, (40, 32)) for seed in seeds], "question": "What is it? " * (1 + index % 3)}
        for index, seeds in enumerate(PICTURES)
    ]
    return docs if order is None else [docs[index] for index in order]


def to_messages(doc):
    parts = [{"type": "image", "url": image} for image in doc["images"]]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": doc["question"]}]}]


def loaded(kind, checkpoint, docs, shares=None, **arguments):
    model = kind(pretrained=checkpoint, device="cpu", **arguments)
    model.task_dict = {"task": {"test": docs}}
    model.vlm.shared_prefix.shares = shares
    return model


def answers(model, docs, **settings):
    settings = GREEDY | settings
    return model.generate_until(
        [request(doc["question"], to_messages, settings, index, "task", "test") for index, doc in enumerate(docs)]
    )


def scores(model, docs, targets):
    return model.loglikelihood(
        [
            request(doc["question"], target, lambda doc: doc["images"], index, "task", "test")
            for index, doc in enumerate(docs)
            for target in targets
        ]
    )


def tokens_run(model) -> list[int]:
    """Returns a list that notes how many tokens each forward of the language model takes, rows times length."""
    run = []
    model.vlm.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: run.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    return run


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"repetition_penalty": 1.3}], ids=str)
@pytest.mark.parametrize("folder", ["checkpoint", "windowed"])
def test_answers_are_those_of_one_prompt_at_a_time_in_any_order(request, folder, settings):
    folder, docs = request.getfixturevalue(folder), documents()
    alone = answers(loaded(DeemChat, folder, docs, shares=False), docs, **settings)
    order = random.Random(0).sample(range(len(docs)), len(docs))
    mixed = documents(order)

    assert len(set(alone)) > 2
    for batch_size in (1, 2, 9):
        model = loaded(DeemChat, folder, mixed, batch_size=batch_size)
        assert answers(model, mixed, **settings) == [alone[index] for index in order]
        assert model.vlm.shared_prefix.shares


@pytest.mark.parametrize("folder", ["checkpoint", "windowed"])
def test_log_likelihoods_are_those_of_one_prompt_at_a_time(request, folder):
    folder, docs = request.getfixturevalue(folder), documents()
    targets = ["yes", "no", "yes it is", "not at all, as far as I can see"]
    expected = scores(loaded(DeemSimple, folder, docs, shares=False), docs, targets)

    given = scores(loaded(DeemSimple, folder, docs, batch_size=4), docs, targets)

    assert [score for score, _ in given] == pytest.approx([score for score, _ in expected], rel=1e-4)
    assert [greedy for _, greedy in given] == [greedy for _, greedy in expected]


def test_a_picture_and_what_prompts_begin_with_run_once(checkpoint):
    docs = [{"images": [tiny_image(0)], "question": f"{'Is it? ' * 5}{number}"} for number in range(6)]
    model = loaded(DeemChat, checkpoint, docs, batch_size=3)
    answers(model, docs)  # compares once
    run = tokens_run(model)
    seen = []
    model.vlm.model.model.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))

    answers(model, docs, max_new_tokens=1)

    prompt = len(model.vlm.processor.tokenizer(f"{'Is it? ' * 5}").input_ids)
    assert seen == [1] and len(run) == 3 and run[0] > prompt
    assert run[1] == run[2] < 3 * 20  # three prompts from where they differ


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_half_precision_scores_are_equal_but_for_rounding(checkpoint, dtype):
    docs = documents()
    plain, shared = (
        scores(loaded(DeemSimple, checkpoint, docs, own, dtype=dtype, batch_size=4), docs, ["yes it is", "no"])
        for own in (False, None)
    )
    assert [score for score, _ in shared] == pytest.approx([score for score, _ in plain], rel=0.02)


def test_pictures_behind_the_question_are_not_shared(checkpoint):
    """The prompts' common beginning has to hold all pictures."""

    def behind(doc):
        parts = [{"type": "image", "url": image} for image in doc["images"]]
        return [{"role": "user", "content": [{"type": "text", "text": doc["question"]}, *parts]}]

    docs = documents()
    requests = [request("", behind, GREEDY, index, "task", "test") for index in range(len(docs))]
    alone = loaded(DeemChat, checkpoint, docs, shares=False).generate_until(requests)
    assert loaded(DeemChat, checkpoint, docs, batch_size=4).generate_until(requests) == alone


def test_to_say_nothing_is_certain(checkpoint):
    docs = documents()[:3]
    given = scores(loaded(DeemSimple, checkpoint, docs), docs, ["", "yes"])
    assert given[::2] == [(-0.0, True)] * 3 and all(score > 0 for score, _ in given[1::2])


def test_what_would_come_out_otherwise_is_computed_in_full_and_said_once(checkpoint, caplog):
    docs = documents()
    model = loaded(DeemChat, checkpoint, docs, batch_size=2)

    def widen(module, args, output):  # a state beside the cache: how long the input is
        output.last_hidden_state[:, -1, : output.last_hidden_state.shape[1] % 16] = 1.0

    model.vlm.model.model.language_model.register_forward_hook(widen)
    with caplog.at_level(logging.WARNING):
        answers(model, docs)
        answers(model, docs)

    told = [record.getMessage() for record in caplog.records if "not shared" in record.getMessage()]
    assert len(told) == 1 and "its logits differ by" in told[0]
    assert model.vlm.shared_prefix.shares is False


def test_a_model_that_knows_no_cache_is_told_and_answers(checkpoint, caplog, monkeypatch):
    docs = documents()
    alone = answers(loaded(DeemChat, checkpoint, docs, shares=False), docs)
    monkeypatch.setattr("deem_plugin.evaluation.shared_prefix._Prefix.behind", lambda *args, **kwargs: 1 / 0)

    with caplog.at_level(logging.WARNING):
        assert answers(loaded(DeemChat, checkpoint, docs), docs) == alone
    assert "does not continue from a cache (ZeroDivisionError" in caplog.text


def test_sampled_answers_are_drawn_as_before(checkpoint, monkeypatch):
    docs = documents()
    monkeypatch.setattr(SharedPrefix, "_compare", lambda *args: pytest.fail("shares"))
    assert len(answers(loaded(DeemChat, checkpoint, docs), docs, do_sample=True, temperature=1.0)) == len(docs)


def test_pictures_that_differ_in_one_pixel_are_not_taken_for_each_other(checkpoint):
    first, second = tiny_image(0), tiny_image(0)
    second.putpixel((3, 3), (0, 255, 0) if second.getpixel((3, 3)) != (0, 255, 0) else (0, 0, 0))
    docs = [{"images": [image], "question": "What is it?"} for image in (first, second)]
    model = loaded(DeemChat, checkpoint, docs, batch_size=2)
    seen = []
    model.vlm.model.model.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))

    answers(model, docs)

    assert sum(seen) == 2
