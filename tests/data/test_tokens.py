"""Text to tokens: whatever the tokenizer merges and the processor writes, spans are the tokens that they became."""

import pytest
import torch
import transformers as hf

from deem_plugin.data.tokens import image_spans, tokenize
from deem_plugin.models.processing import DeemProcessor

from ..text_tokenizers import TOKENIZERS, byte_bpe, metaspace_bpe, unigram
from ..tiny import IMAGE_SIZE, PATCH_SIZE, tiny_image, tiny_image_processor

SIZE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}


def llava(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return hf.LlavaProcessor(
        tiny_image_processor(), tokenizer, PATCH_SIZE, "default", image_token="<image>", num_additional_image_tokens=1
    )


def deem(tokenizer):
    from deem_plugin.vision.image_processing import DeemImageProcessor

    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_start>", "<image>"]})
    images = DeemImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=SIZE)
    return DeemProcessor(images, tokenizer, num_image_tokens=3)


def named(tokenizer, **tokens):
    """Gives a tokenizer special tokens that it knows by name, as the published ones of these families do."""
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens.values())})
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    return tokenizer


def qwen(tokenizer):
    named(tokenizer, image_token="<|image_pad|>", video_token="<|video_pad|>")
    images = hf.Qwen2VLImageProcessor(patch_size=8, merge_size=2, min_pixels=256, max_pixels=1024)
    return hf.Qwen2_5_VLProcessor(images, tokenizer, hf.Qwen2VLVideoProcessor())


def gemma(tokenizer):
    named(tokenizer, boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    return hf.Gemma3Processor(hf.Gemma3ImageProcessor(size=SIZE), tokenizer, image_seq_length=4)


def mllama(tokenizer):
    named(tokenizer, image_token="<|image|>")
    return hf.MllamaProcessor(hf.MllamaImageProcessor(size=SIZE, max_image_tiles=2), tokenizer)


def smolvlm(tokenizer):
    marks = ["<fake_token_around_image>", "<global-img>", *(f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2))]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_utterance>", *marks, "<image>"]})
    images = hf.SmolVLMImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    return hf.SmolVLMProcessor(images, tokenizer, hf.SmolVLMVideoProcessor(), image_seq_len=4)


def paligemma(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = tiny_image_processor()
    images.image_seq_length = 4
    return hf.PaliGemmaProcessor(images, tokenizer)


PROCESSORS = {"llava": llava, "deem": deem, "qwen": qwen, "gemma": gemma, "smolvlm": smolvlm, "mllama": mllama}
CASES = [(make, kind) for make in PROCESSORS for kind in TOKENIZERS if (make, kind) != ("mllama", "unigram")]


def read(processor, row, positions):
    return processor.tokenizer.decode(row[positions]).strip()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("make", "kind"), CASES)
def test_the_tokens_of_spans_are_those_of_their_text(make, kind, side):
    """Two rows of different lengths, two images in one of them, words behind and between them."""
    processor = PROCESSORS[make](TOKENIZERS[kind]())
    bos, mark = processor.tokenizer.bos_token or "", processor.image_token
    if make == "mllama":  # writes it unasked where the text does not
        bos = bos or "<bos>"
        processor.bos_token = bos
    texts = [f"{bos}{mark}a cat and{mark}a big dog. yes</s>", f"{bos}{mark}what is it? red"]
    images = [[tiny_image(0), tiny_image(1)], [tiny_image(2)]]
    parts = [["a cat and", mark, "big", " yes"], ["what", " red", "what is it? red"]]
    spans = [
        [(text.index(part), text.index(part) + len(part)) for part in own]
        for text, own in zip(texts, parts, strict=True)
    ]

    inputs, tokens = tokenize(processor, texts, images, spans, padding_side=side)

    assert {"offset_mapping", "special_tokens_mask", "text_replacement_offsets"}.isdisjoint(inputs)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for row, own in enumerate(parts):
        for part, positions in zip(own, tokens[row], strict=True):
            assert mask[row, positions].all()
            if part != mark:
                assert read(processor, ids[row], positions) == part.strip()
            else:  # the first picture: whatever stands for it, and nothing of the words around it
                placed = ids[row, positions].tolist()
                assert processor.tokenizer.convert_tokens_to_ids("<|image|>" if make == "mllama" else mark) in placed
    # No token twice, and what stands behind a span is not in it.
    assert tokens[1][2] == list(range(tokens[1][0][0], tokens[1][1][-1] + 1))
    assert read(processor, ids[1], [tokens[1][2][-1]]) == "red" and (ids[1] == ids[1][tokens[1][2][-1]]).sum() == 1


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("make", ["llava", "deem", "qwen"])
def test_tokens_are_those_of_the_processor_and_nothing_stands_behind_them(make, kind):
    processor = PROCESSORS[make](TOKENIZERS[kind]())
    text, image = f"{processor.image_token}a big cat and", tiny_image(0)

    inputs, tokens = tokenize(processor, [text], [[image]])
    plain = processor(text=[text], images=[image], return_tensors="pt")

    expected = plain["input_ids"][0].tolist()
    if kind == "unigram":
        assert expected.pop() == processor.tokenizer.eos_token_id
    assert inputs["input_ids"][0].tolist() == expected and tokens == [[]]
    assert torch.equal(inputs["pixel_values"], plain["pixel_values"])


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("ending", ["it", "it ", "it?\n", "it:"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_an_answer_has_every_token_that_holds_a_letter_of_it(kind, ending, side):
    processor = llava(TOKENIZERS[kind]())
    prompts = [f"what is {ending}", f"is this a big dog in the picture? {ending}"]
    answers = ["yes", " maybe no"]
    spans = [[(len(prompt), len(prompt) + len(answer))] for prompt, answer in zip(prompts, answers, strict=True)]

    inputs, tokens = tokenize(
        processor,
        [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)],
        [[], []],
        spans,
        padding_side=side,
    )

    for row, [answer] in enumerate(tokens):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
        assert answer and inputs["input_ids"][row, answer].tolist() == ids[-len(answer) :]
        # By the definition: the fewest last tokens that spell the answer.
        behind = [processor.tokenizer.decode(ids[-count:]) for count in range(1, len(ids) + 1)]
        fewest = next(count for count, text in enumerate(behind, 1) if text.strip().endswith(answers[row].strip()))
        blank = answers[row].startswith(" ") and not behind[fewest - 1].startswith(" ") and kind == "bytes"
        assert len(answer) == fewest + blank


def test_a_trimmed_space_belongs_to_the_token_that_holds_it():
    """Llama 3's offsets leave the space before a word out, and have no length for one alone."""
    processor = llava(byte_bpe(bos=True))
    text = "is it é"

    inputs, [[blank, letter]] = tokenize(processor, [text], [[]], [[(5, 6), (6, 7)]])

    names = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    assert [names[index] for index in blank] == ["Ġ"] and [names[index] for index in letter] == ["Ã", "©"]


@pytest.mark.parametrize("bos", [True, False])
def test_the_first_token_comes_once(bos):
    processor = llava(metaspace_bpe())
    texts = [("<s>" if bos else "") + text for text in ("a cat", "a big dog")]

    inputs, _ = tokenize(processor, texts, [[], []])

    assert (inputs["input_ids"] == 1).sum(1).tolist() == [1, 1]


def test_a_tokenizer_without_a_padding_token_pads_out_of_sight():
    processor = llava(byte_bpe())
    assert processor.tokenizer.pad_token is None

    inputs, _ = tokenize(processor, ["a", "a big dog"], [[], []], padding_side="left")

    assert inputs["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]


def test_regions_reach_the_processor():
    processor = deem(metaspace_bpe())
    images, regions = [[tiny_image(0)], [tiny_image(1), tiny_image(2)]], [[None], [[0, 0, 16, 32], None]]

    inputs, _ = tokenize(processor, ["<image>a", "<image>a<image>"], images, regions=regions)

    assert inputs["region_masks"].flatten(1).mean(1).tolist() == pytest.approx([1.0, 0.5, 1.0])


@pytest.mark.parametrize("kind", ["metaspace", "bytes trimmed"])
@pytest.mark.parametrize("end", ["", "</s>"])
def test_paligemma_puts_a_line_break_between_prompt_and_answer(kind, end):
    processor = paligemma(TOKENIZERS[kind]())
    texts = ["<image>is it a cat?yes" + end, "<image><image>what?a red dog" + end]
    spans = [[(19, len(texts[0])), (0, 7)], [(19, len(texts[1]))]]
    images = [[tiny_image(0)], [tiny_image(1), tiny_image(2)]]

    inputs, tokens = tokenize(processor, texts, images, spans)

    ids = inputs["input_ids"]
    assert [processor.tokenizer.decode(ids[row, tokens[row][0]]) for row in (0, 1)] == ["yes" + end, "a red dog" + end]
    assert (ids[0, tokens[0][1]] == processor.image_token_id).all() and len(tokens[0][1]) == 4
    before = processor.tokenizer.decode(ids[0, : tokens[0][0][0]])
    assert before.endswith("is it a cat?\n") and "labels" not in inputs
    assert inputs["token_type_ids"][1, tokens[1][0]].all()
    assert (ids == processor.tokenizer.eos_token_id).sum() == (2 if end else 0) + (inputs["attention_mask"] == 0).sum()
    prompt, _ = tokenize(processor, ["<image>is it a cat?"], images[:1])
    assert prompt["input_ids"][0].tolist() == ids[0, : tokens[0][0][0]].tolist()
    with pytest.raises(ValueError, match="takes a prompt and one answer at its end"):
        tokenize(processor, texts[:1], images[:1], [[(9, 12)]])
    with pytest.raises(ValueError, match="but of '.*cat.yes.*' other parts are asked for"):
        tokenize(processor, texts[:1], images[:1], [[spans[0][0], (9, 12)]])


def test_a_processor_that_adds_to_the_text_unasked_is_an_error():
    processor = mllama(byte_bpe(bos=True))

    with pytest.raises(ValueError, match="adds to the text .*set `model.chat_template`"):
        tokenize(processor, ["<|image|>what? yes"], [[tiny_image(0)]], [[(14, 18)]])


def test_marks_are_found():
    assert image_spans(deem(unigram()), "<image>a<image>") == [(0, 7), (8, 15)]
