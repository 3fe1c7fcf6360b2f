"""What is trained is what is asked in use, whatever a tokenizer merges: prompts are beginnings of what was learned."""

import pickle

import pytest

from deem_plugin.data.chat import render_chat, to_parts
from deem_plugin.data.collator import ConversationCollator
from deem_plugin.data.document_collator import DocumentCollator
from deem_plugin.data.tokens import tokenize
from deem_plugin.resources import recipes_dir

from ..text_tokenizers import TOKENIZERS
from ..tiny import tiny_image
from .test_tokens import deem, llava, paligemma

IMAGE, OTHER = tiny_image(0), tiny_image(1)
VICUNA = (recipes_dir() / "vicuna_v1.jinja").read_text(encoding="utf-8")
# A language model's own, for strings, whose prompt ends in a space.
SPACED = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def part(**given):
    return dict.fromkeys(("text", "image", "box", "points", "mask")) | given


def with_template(processor, template):
    """Gives a processor a template of its own, or its tokenizer one."""
    if template is SPACED:
        processor.tokenizer.chat_template = template
    else:
        processor.chat_template = template
    return processor


def trained(processor, parts, learn_from):
    """Returns ids of a document as it is trained, and those of them that are learned."""
    batch = DocumentCollator(processor)([{"parts": parts, "learn_from": learn_from}])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert all(label in (-100, one) for label, one in zip(labels, ids, strict=True))
    return ids, [index for index, label in enumerate(labels) if label != -100]


def asked(processor, text, images=(), **options):
    inputs, _ = tokenize(processor, [text], [list(images)], **options)
    return inputs["input_ids"][0].tolist()


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("caption", ["a cat and a dog", " red", "big.\nyes"])
def test_captions_are_read_and_drawn_in_the_tokens_that_were_learned(kind, caption):
    processor = deem(TOKENIZERS[kind]())
    picture, words, eos = part(image=IMAGE), part(text=caption), processor.tokenizer.eos_token_id

    ids, learned = trained(processor, [picture, words], 1)
    prompt = asked(processor, "<image>", [IMAGE])
    assert ids[: len(prompt)] == prompt and learned == list(range(len(prompt), len(ids)))
    assert ids == [*asked(processor, "<image>" + caption, [IMAGE]), eos]

    ids, learned = trained(processor, [words, picture], 1)
    prompt = asked(processor, caption + "<image_start>")
    assert ids[: len(prompt)] == prompt and learned == [len(prompt) - 1, len(ids) - 1] and ids[-1] == eos


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_documents_are_gone_on_with_in_the_tokens_that_were_learned(kind):
    processor = deem(TOKENIZERS[kind]())
    texts = ["a cat and", None, "a red dog in", None, "the picture"]
    parts = [part(image=IMAGE) if text is None else part(text=text) for text in texts]

    ids, learned = trained(processor, parts, 0)
    slots = [index for index, one in enumerate(ids) if one == processor.image_token_id]
    assert learned == [index for index in range(1, len(ids)) if index not in slots]

    text, images = "", []
    for one in texts:
        text, images = text + (one or "<image>"), images + [IMAGE] * (one is None)
        prompt = asked(processor, text, images)
        assert ids[: len(prompt)] == prompt
    assert ids[len(prompt) :] == [processor.tokenizer.eos_token_id]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("question", ["\nwhat is this region?\n", " what is it? ", "is this red:"])
@pytest.mark.parametrize("answer", ["a big dog", "é"])
def test_regions_are_asked_about_in_the_tokens_that_were_learned(kind, question, answer):
    if (kind, answer, question[-1]) == ("unigram", "é", "\n"):
        pytest.skip("T5's joins a line break with a word that it knows, and drops it at the end of a prompt")
    processor = deem(TOKENIZERS[kind]())
    box = [0, 0, 16, 32]
    parts = [part(image=IMAGE, box=box), part(text=question), part(text=answer)]

    ids, learned = trained(processor, parts, 2)

    prompt = asked(processor, "<image>" + question.rstrip(" "), [IMAGE], regions=[[box]])
    assert ids[: len(prompt)] == prompt and learned == list(range(len(prompt), len(ids)))


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", [VICUNA, SPACED], ids=["of the processor", "of the tokenizer"])
@pytest.mark.parametrize("make", [llava, deem])
def test_answers_follow_the_prompt_that_was_learned(kind, template, make):
    processor = with_template(make(TOKENIZERS[kind]()), template)
    turns = ["<image>\nwhat is it?", "a red dog.", "and <image>", "yes", "no?", "maybe\nin the picture"]
    messages = [{"role": role, "content": turn} for role, turn in zip(["user", "assistant"] * 3, turns, strict=True)]

    batch = ConversationCollator(processor)([{"messages": messages, "images": [IMAGE, OTHER]}])

    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    learned = []
    chat = [{**message, "content": to_parts(message["content"])} for message in messages]
    for index in (1, 3, 5):
        shown = [IMAGE, OTHER][: 1 if index == 1 else 2]
        prompt = asked(processor, render_chat(processor, chat[:index], add_generation_prompt=True), shown)
        answer = ids[len(prompt) : ids.index(processor.tokenizer.eos_token_id, len(prompt)) + 1]
        assert ids[: len(prompt)] == prompt
        assert processor.tokenizer.decode(answer[:-1]).strip().split() == turns[index].split()
        learned += range(len(prompt), len(prompt) + len(answer))
    assert [index for index, label in enumerate(labels) if label != -100] == learned
    assert [labels[index] for index in learned] == [ids[index] for index in learned]


@pytest.mark.parametrize("kind", ["metaspace", "bytes trimmed"])
def test_paligemma_learns_the_answer_to_a_prompt(kind):
    processor = paligemma(TOKENIZERS[kind]())
    messages = [{"role": "user", "content": "<image>\nis it a cat?"}, {"role": "assistant", "content": "yes"}]

    batch = ConversationCollator(processor)([{"messages": messages, "images": [IMAGE]}])

    chat = [{**message, "content": to_parts(message["content"])} for message in messages]
    prompt = asked(processor, render_chat(processor, chat[:1], add_generation_prompt=True), [IMAGE])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert ids[: len(prompt)] == prompt and labels == [-100] * len(prompt) + ids[len(prompt) :]
    assert processor.tokenizer.decode(ids[len(prompt) :]) == "yes</s>"


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", ["an <image> of it", "<image_start> red", "no</s> yes", "<s>a cat"])
def test_what_looks_like_a_mark_in_a_text_is_text(kind, text):
    processor = with_template(deem(TOKENIZERS[kind]()), VICUNA)
    marks = {processor.image_token_id, processor.image_start_token_id}

    ids, _ = trained(processor, [part(text=text)], 0)
    prompt = render_chat(processor, [{"role": "user", "content": [{"type": "text", "text": text}]}], True)

    assert marks.isdisjoint(ids) and marks.isdisjoint(asked(processor, prompt))
    assert ids.index(processor.tokenizer.eos_token_id) == len(ids) - 1
    assert processor.tokenizer.bos_token_id not in ids[1:]


def test_collators_travel_to_workers_that_are_spawned():
    processor = with_template(deem(TOKENIZERS["metaspace"]()), VICUNA)
    example = {"messages": [{"role": "user", "content": "is it?"}, {"role": "assistant", "content": "yes"}]}
    document = {"parts": [part(text="a cat")], "learn_from": 0}

    for collator, one in ((ConversationCollator(processor), example), (DocumentCollator(processor), document)):
        again = pickle.loads(pickle.dumps(collator))
        assert again([one])["labels"].tolist() == collator([one])["labels"].tolist()
