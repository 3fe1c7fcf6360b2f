"""The model class: batches answer as single prompts do, prompts are those of training, bad arguments are named."""

import copy

import pytest
import torch

from deem_plugin.data.chat import render_chat
from deem_plugin.evaluation.lmms import DeemChat, DeemSimple

from ..tiny import tiny_llava
from .helpers import request

GREEDY = {"max_new_tokens": 6, "temperature": 0, "top_p": 0, "num_beams": 1, "do_sample": False, "until": ["\n\n"]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    tiny_llava(folder)
    return str(folder)


def to_messages(doc):
    parts = [{"type": "image", "url": image} for image in doc["images"]]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": doc["question"]}]}]


def chat(checkpoint, docs, **kwargs):
    model = DeemChat(pretrained=checkpoint, device="cpu", **kwargs)
    model.task_dict = {"task": {"test": docs}}
    return model


def chat_requests(docs, **generation):
    kwargs = {**GREEDY, **generation}
    return [request(d["question"], to_messages, dict(kwargs), i, "task", "test") for i, d in enumerate(docs)]


def simple_requests(docs, second):
    return [
        request(doc["question"], second, lambda doc: doc["images"], index, "task", "test")
        for index, doc in enumerate(docs)
    ]


def test_a_batch_answers_what_generate_answers_to_each_prompt_alone(checkpoint, docs):
    model = chat(checkpoint, docs, batch_size="4")
    expected = []
    for doc in docs:
        content = [*({"type": "image"} for _ in doc["images"]), {"type": "text", "text": doc["question"]}]
        text = render_chat(model.vlm.processor, [{"role": "user", "content": content}], add_generation_prompt=True)
        # The template writes the bos token, so the tokenizer must not.
        inputs = model.vlm.processor(
            text=text, images=doc["images"] or None, return_tensors="pt", add_special_tokens=False
        )
        output = model.vlm.model.generate(**inputs, do_sample=False, max_new_tokens=6)
        answer = model.vlm.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        expected.append(answer.split("\n\n")[0])

    assert model.generate_until(chat_requests(docs)) == expected
    assert len(set(expected)) > 1


def test_the_simple_class_answers_as_the_chat_class(checkpoint, docs):
    simple = DeemSimple(pretrained=checkpoint, device="cpu", batch_size=2)
    simple.task_dict = {"task": {"test": docs}}
    requests = [
        request(doc["question"], dict(GREEDY), lambda doc: doc["images"], index, "task", "test")
        for index, doc in enumerate(docs)
    ]

    assert simple.generate_until(requests) == chat(checkpoint, docs).generate_until(chat_requests(docs))


def test_requests_that_generate_differently_do_not_share_a_batch(checkpoint, docs):
    model = chat(checkpoint, docs, batch_size=8)
    long, short = chat_requests(docs), chat_requests(docs, max_new_tokens=1)

    together = model.generate_until([*long, *short])

    assert together == model.generate_until(long) + model.generate_until(short)


def test_generation_settings_are_cleaned(checkpoint, docs):
    """Greedy decoding keeps no sampling settings; settings that only other models know are left out."""
    model = chat(checkpoint, docs)
    before = copy.deepcopy(model.vlm.model.generation_config)

    greedy = model.vlm._generation_config({"temperature": 0, "top_p": 0.5, "max_frames": 8})
    sampled = model.vlm._generation_config({"temperature": 0.7, "max_new_tokens": 3})

    assert (greedy.do_sample, greedy.temperature, greedy.top_p, greedy.max_new_tokens) == (False, None, None, 1024)
    assert (sampled.do_sample, sampled.temperature, sampled.max_new_tokens) == (True, 0.7, 3)
    assert not hasattr(greedy, "max_frames")
    assert model.vlm.model.generation_config.to_dict() == before.to_dict()


@pytest.mark.parametrize(
    ("raw", "until", "answer"),
    [
        ("\n\n cat\n\ndog", ["\n\n"], "\n\n cat"),
        ("cat. dog; cow", [";", "."], "cat"),
        ("cat stop dog", "stop", "cat "),
        ("cat dog", [""], "cat dog"),
        ("cat\n\ndog", None, "cat\n\ndog"),
    ],
)
def test_answers_end_at_stop_strings(checkpoint, docs, monkeypatch, raw, until, answer):
    model = chat(checkpoint, docs[:1])
    monkeypatch.setattr(model.vlm.processor, "batch_decode", lambda tokens, **kwargs: [raw] * len(tokens))

    assert model.generate_until(chat_requests(docs[:1], until=until)) == [answer]


def test_log_likelihoods_are_those_of_the_target_tokens(checkpoint, docs):
    """Against the definition, one prompt at a time: minus the sum of the log-probabilities after the prompt."""
    model = DeemSimple(pretrained=checkpoint, device="cpu", batch_size=3)
    model.task_dict = {"task": {"test": docs}}
    targets = ["yes", "no, it is not", "a", "bc", "yes"]

    scores = model.loglikelihood(simple_requests(docs, lambda doc: targets[docs.index(doc)]))

    for doc, target, (score, is_greedy) in zip(docs, targets, scores, strict=True):
        content = [*({"type": "image"} for _ in doc["images"]), {"type": "text", "text": doc["question"]}]
        text = render_chat(model.vlm.processor, [{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = model.vlm.processor(
            text=text + target, images=doc["images"] or None, return_tensors="pt", add_special_tokens=False
        )
        with torch.no_grad():
            log_probs = model.vlm.model(**inputs).logits[0].log_softmax(-1)
        tokens = inputs["input_ids"][0]
        places = range(len(tokens) - len(target), len(tokens))  # the tokenizer is byte-level
        assert score == pytest.approx(-sum(log_probs[place - 1, tokens[place]].item() for place in places), rel=1e-4)
        assert is_greedy == all(log_probs[place - 1].argmax() == tokens[place] for place in places)


def test_what_the_classes_cannot_do_is_refused_with_the_way_out(checkpoint, docs):
    model = chat(checkpoint, docs)

    with pytest.raises(NotImplementedError, match="--force_simple"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="several rounds"):
        model.generate_until_multi_round([])
    docs[0]["images"] = []
    video = [{"role": "user", "content": [{"type": "video", "url": "v.mp4"}]}]
    with pytest.raises(ValueError, match="'video'.*text and images only"):
        model.generate_until([request("", lambda doc: video, GREEDY, 0, "task", "test")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": "auto"}, "batch_size is 'auto'; .* whole number"),
        ({"batch_size": 0}, "batch_size is 0"),
        (
            {"dtpye": "float32"},
            r"Unknown model arguments \['dtpye'\]; choose from pretrained, batch_size, device, dtype",
        ),
        ({"dtype": "int8"}, "dtype is 'int8'; choose one of auto, float32, bfloat16, float16"),
        ({"image_dir": "out"}, "image_dir=out has every prompt answered by a picture, which needs diffusion_model="),
        ({"pretrained": None}, "needs a checkpoint"),
    ],
)
def test_wrong_arguments_are_errors_that_name_the_choices(checkpoint, arguments, message):
    with pytest.raises(ValueError, match=message):
        DeemChat(**{"pretrained": checkpoint, **arguments})


def test_dtype_and_ranks_are_as_asked(checkpoint):
    model = DeemChat(pretrained=checkpoint, device="cpu", dtype="bfloat16")

    assert model.vlm.model.dtype == torch.bfloat16
    assert (model.rank, model.world_size, model.device) == (0, 1, torch.device("cpu"))
