"""Questions behind a shared prefix are answered as one at a time, by every family that generates."""

import inspect
from types import SimpleNamespace

import pytest
import torch

from deem_plugin.evaluation.shared_prefix import SharedPrefix, forward

from .builders import FAMILIES, POPULAR, build
from .outcomes import BROKEN
from .vocabulary import IMAGE, batch_of

# Each of the two pictures is asked about three times, in mixed order.
PICTURES = [0, 1, 0, 1, 1, 0]
QUESTIONS = [
    [40, 41, 11, 12],
    [40, 41, 42, 43, 21],
    [40, 41, 11, 14, 15, 16, 17],
    [40, 41, 42, 43, 22, 23, 24, 25],
    [40, 41, 42, 43, 21, 30],
    [40, 41, 31],
]
# Not asked: what these see is not read by a decoder that is given a question, or they take one picture at a time, or
# transformers cannot generate with the tiny model.
UNASKED = [
    "vision-encoder-decoder",
    "pp_formulanet",
    "pix2struct",
    "kosmos-2.5",
    "blip",
    "instructblip",
    "inkling2",
    "inkling2_loop",
    "inkling_mm_model",
]
CASES = [
    name if name in POPULAR else pytest.param(name, marks=pytest.mark.slow)
    for name in FAMILIES
    if name not in [*BROKEN, *UNASKED]
]


# Families that share nothing: encoder-decoders and PaliGemma read the picture together with the question; the others
# do not go on from a cache that another call has made (with transformers 5.24).
ALONE = ["florence2", "t5gemma2", "paligemma", "blip-2", "idefics", "git"]


class Processor:
    """What is asked of a processor beside its inputs."""

    image_token = "<image>"
    tokenizer = SimpleNamespace(pad_token_id=0, convert_tokens_to_ids=lambda token: IMAGE)

    def __call__(self):
        raise AssertionError


class PaliGemmas(Processor):
    def __call__(self, suffix):
        raise AssertionError


def answers(name, case, shares, work, at_once, **options):
    def encode(rows, side):
        pictures, questions = [PICTURES[row] for row in rows], [QUESTIONS[row] for row in rows]
        batch = batch_of(FAMILIES[name], case.model, case.image_processor, pictures, questions, side)
        del batch["labels"]
        known = inspect.signature(case.model.forward).parameters
        return {name: value for name, value in batch.items() if name in known}

    prefix = SharedPrefix(case.model, (PaliGemmas if name == "paligemma" else Processor)())
    if not shares:
        prefix.shares = False
    with torch.inference_mode():
        return prefix.run(encode, PICTURES, work, at_once, **options), prefix.shares


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_of_one_question_at_a_time(name):
    case = build(name)

    def generate(rows, inputs):
        output = case.model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    def score(rows, inputs):
        return list(forward(case.model, inputs, 2).logits[:, -2:].log_softmax(-1))

    alone, _ = answers(name, case, False, generate, 1)
    shared, shares = answers(name, case, True, generate, 4)
    assert shared == alone and shares is (name not in ALONE)
    if case.model.config.is_encoder_decoder:
        return
    options = {"leave": 1, "needs": [2] * len(QUESTIONS)}
    alone, _ = answers(name, case, False, score, 1, **options)
    shared, shares = answers(name, case, True, score, 4, **options)
    torch.testing.assert_close(shared, alone, rtol=1e-3, atol=1e-3)
