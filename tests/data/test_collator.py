import pytest
import torch
from transformers import (
    Gemma3ImageProcessor,
    Gemma3Processor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    MllamaImageProcessor,
    MllamaProcessor,
    PaliGemmaProcessor,
    PixtralImageProcessor,
    PixtralProcessor,
)

from deem_plugin.data.chat import render_chat, to_parts
from deem_plugin.data.collator import IGNORE_INDEX, ConversationCollator

from ..tiny import (
    CHAT_TEMPLATE,
    IMAGE_SIZE,
    PATCH_SIZE,
    tiny_image,
    tiny_image_processor,
    tiny_processor,
    tiny_tokenizer,
)

# llava-hf's form: no system text, a space behind each turn and no end-of-turn token.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# Writes an extra remark in front of the last turn only, so that history looks different.
UNSTABLE_TEMPLATE = (
    "{% for message in messages %}{% if loop.last %}[last]{% endif %}{{ message['role'] }}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"
)


def conversation(*turns, images=()):
    roles = ["user", "assistant"] * len(turns)
    return {
        "messages": [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)],
        "images": list(images),
    }


def examples():
    """Several turns and images, text only, and answers that need more than one byte a letter."""
    return [
        conversation("<image>\nWhat is é?", "A réd 🙂.", "And <image>?", "yes", images=[tiny_image(0), tiny_image(1)]),
        conversation("Hi", "Hello <b>you</b>!"),
        conversation("<image>", "x", images=[tiny_image(2, (50, 20))]),
    ]


def next_processor():
    image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_grid_pinpoints=[[IMAGE_SIZE, 2 * IMAGE_SIZE], [2 * IMAGE_SIZE, IMAGE_SIZE]],
    )
    return LlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=tiny_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )


def decode_labels(processor, row):
    return processor.tokenizer.decode(row[row != IGNORE_INDEX])


@pytest.mark.parametrize("make", [tiny_processor, next_processor])
def test_the_labels_are_the_answers_with_their_end_of_turn_and_nothing_else(make):
    processor = make()

    batch = ConversationCollator(processor)(examples())

    assert [decode_labels(processor, row) for row in batch["labels"]] == [
        "A réd 🙂.<|im_end|>yes<|im_end|>",
        "Hello <b>you</b>!<|im_end|>",
        "x<|im_end|>",
    ]
    shown = batch["labels"] != IGNORE_INDEX
    assert torch.equal(batch["labels"][shown], batch["input_ids"][shown])


@pytest.mark.parametrize("make", [tiny_processor, next_processor])
def test_the_text_is_the_one_that_evaluation_renders(make):
    processor = make()
    example = examples()[0]
    messages = [{**message, "content": to_parts(message["content"])} for message in example["messages"]]

    batch = ConversationCollator(processor)([example])
    expected = processor(
        text=render_chat(processor, messages),
        images=example["images"],
        return_tensors="pt",
        add_special_tokens=False,
    )

    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("make", [tiny_processor, next_processor])
def test_a_batch_holds_what_its_examples_hold_one_at_a_time(make):
    collator = ConversationCollator(make())

    batch = collator(examples())
    single = [collator([example]) for example in examples()]

    for index, one in enumerate(single):
        length = one["input_ids"].shape[1]
        for name, fill in (
            ("input_ids", collator.processor.tokenizer.pad_token_id),
            ("attention_mask", 0),
            ("labels", -100),
        ):
            assert torch.equal(batch[name][index, :length], one[name][0])
            assert (batch[name][index, length:] == fill).all()
    pixels = [one["pixel_values"] for one in single if "pixel_values" in one]
    assert torch.equal(batch["pixel_values"], torch.cat(pixels))


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PLAIN_TEMPLATE])
def test_there_is_one_bos_if_either_the_template_or_the_tokenizer_writes_it(adds_bos, template):
    processor = tiny_processor(adds_bos)
    processor.chat_template = template

    ids = ConversationCollator(processor)(examples())["input_ids"]

    expected = 1 if adds_bos or template == CHAT_TEMPLATE else 0
    assert ((ids == processor.tokenizer.bos_token_id).sum(dim=1) == expected).all()


def test_a_template_without_an_end_of_turn_gets_one_behind_every_answer():
    processor = tiny_processor()
    processor.chat_template = PLAIN_TEMPLATE

    batch = ConversationCollator(processor)([conversation("Hi", "Hello", "And?", "yes")])

    assert decode_labels(processor, batch["labels"][0]) == " Hello<|im_end|> yes<|im_end|>"
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert text == "USER: Hi ASSISTANT: Hello<|im_end|> USER: And? ASSISTANT: yes<|im_end|> "


def test_a_language_models_template_that_knows_only_strings_works():
    processor = tiny_processor()
    processor.chat_template = None

    batch = ConversationCollator(processor)(examples())

    assert decode_labels(processor, batch["labels"][2]) == "x<|im_end|>"


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PLAIN_TEMPLATE])
@pytest.mark.parametrize("answer", ["im", "end", "<", "s", " padded ", "two\nlines", ""])
def test_any_answer_ends_with_one_end_of_turn(template, answer):
    processor = tiny_processor()
    processor.chat_template = template

    batch = ConversationCollator(processor)([conversation("Hi", answer)])

    # Templates differ in the blanks around an answer.
    assert decode_labels(processor, batch["labels"][0]).replace(" ", "") == f"{answer}<|im_end|>".replace(" ", "")


def test_text_only_batches_bring_no_pixels():
    batch = ConversationCollator(tiny_processor())([examples()[1]])

    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_a_tokenizer_without_an_end_is_named():
    processor = tiny_processor()
    processor.tokenizer.pad_token = processor.tokenizer.eos_token = None

    with pytest.raises(ValueError, match="has no end-of-sequence token.*`eos_token`"):
        ConversationCollator(processor)([conversation("a", "b")])


def test_a_template_that_rewrites_history_is_an_error():
    processor = tiny_processor()
    processor.chat_template = UNSTABLE_TEMPLATE

    with pytest.raises(ValueError, match="renders a turn differently .*Set `model.chat_template`"):
        ConversationCollator(processor)([conversation("Hi", "Hello", "And?", "yes")])


@pytest.mark.parametrize("end", ["<|im_end|>\n", "\n"])
def test_a_template_that_rewrites_an_answer_is_an_error_that_names_it(end):
    """As those of models that think, which leave the thoughts of earlier answers out."""
    processor = tiny_processor()
    rewritten = CHAT_TEMPLATE.replace("{{ part['text'] }}", "{{ part['text'].split('</think>')[-1] }}")
    processor.chat_template = rewritten.replace("<|im_end|>\n", end)
    collator, answer = ConversationCollator(processor), "<think>no</think>It is a cat."

    with pytest.raises(ValueError, match=r"LlavaProcessor \('.*bos_token.*does not write the answer '<think>no"):
        collator([conversation("Hi", answer, "And?", "yes")])
    kept = collator([conversation("Hi", "It is a cat.", "And?", "yes")])
    assert decode_labels(processor, kept["labels"][0]) == "It is a cat.<|im_end|>yes<|im_end|>"


def test_too_long_conversations_lose_their_end():
    collator, short = ConversationCollator(tiny_processor()), ConversationCollator(tiny_processor(), max_length=100)
    whole = collator([examples()[0]])
    assert whole["input_ids"].shape[1] > 100

    batch = short(examples())

    assert batch["input_ids"].shape[1] == 100
    for name in ("input_ids", "labels"):
        assert torch.equal(batch[name][0], whole[name][0, :100])
    assert (collator.cut, short.cut) == (0, 1)


def test_an_image_is_never_cut_but_left_out_with_all_from_its_question_on():
    processor = tiny_processor()
    whole = ConversationCollator(processor)([examples()[0]])
    last = int((whole["input_ids"][0] == processor.image_token_id).nonzero()[-1]) + 1

    kept = ConversationCollator(processor, max_length=last)(examples())
    cutting = ConversationCollator(processor, max_length=last - 1)
    cut = cutting(examples())

    assert torch.equal(kept["input_ids"][0], whole["input_ids"][0, :last]) and len(kept["pixel_values"]) == 3
    assert decode_labels(processor, cut["labels"][0]) == "A réd 🙂.<|im_end|>"
    assert torch.equal(cut["pixel_values"], kept["pixel_values"][[0, 2]])
    assert cutting.cut == 1


def test_no_room_for_the_image_of_a_first_question_is_an_error_that_says_how_much_is_needed():
    processor = tiny_processor()
    ids = ConversationCollator(processor)([examples()[0]])["input_ids"][0].tolist()
    needed = ids.index(processor.image_token_id) + 16

    with pytest.raises(ValueError, match=rf"`data.max_length` = 20 .* its first 1 image.* take {needed} tokens"):
        ConversationCollator(processor, max_length=20)(examples())


def test_a_batch_without_any_answer_left_is_an_error():
    with pytest.raises(ValueError, match="No answer of the batch is left .* `data.max_length` = 12"):
        ConversationCollator(tiny_processor(), max_length=12)([conversation("A long question", "yes")])


def test_more_marks_than_images_are_an_error():
    with pytest.raises(ValueError, match=r"has 2 <image> mark\(s\) but 1 image\(s\)"):
        ConversationCollator(tiny_processor())([conversation("<image><image>?", "no", images=[tiny_image()])])


def test_an_unreadable_image_is_an_error_that_names_it(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"nothing")

    with pytest.raises(ValueError, match="broken.png cannot be read"):
        ConversationCollator(tiny_processor())([conversation("<image>", "x", images=[str(tmp_path / "broken.png")])])


def test_targets_of_the_processor_are_passed_on():
    processor = tiny_processor()
    plain = processor.image_processor.__class__

    class WithTargets(plain):
        def preprocess(self, images, **kwargs):
            out = super().preprocess(images, **kwargs)
            out["target_pixel_values"] = torch.stack(
                [image.mean() * torch.ones(3, 4, 4) for image in out["pixel_values"]]
            )
            return out

    processor.image_processor = WithTargets(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})

    assert ConversationCollator(processor)(examples())["target_pixel_values"].shape == (3, 3, 4, 4)


def family_processor(name):
    """Makes the processor of a family that counts images by text, with a tokenizer that knows its special tokens."""
    specials = {
        "gemma3": {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<soft>"},
        "mllama": {"image_token": "<|image|>"},
        "pixtral": {"image_token": "[IMG]"},
    }[name]
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"  # as their published tokenizers have it
    tokenizer.add_special_tokens({"extra_special_tokens": [*specials.values(), "[IMG_BREAK]", "[IMG_END]"]})
    for key, token in specials.items():
        setattr(tokenizer, key, token)
        setattr(tokenizer, f"{key}_id", tokenizer.convert_tokens_to_ids(token))
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    template = CHAT_TEMPLATE.replace("<image>", specials.get("boi_token", specials["image_token"]))
    if name == "gemma3":
        return Gemma3Processor(Gemma3ImageProcessor(size=size), tokenizer, template, image_seq_length=4)
    if name == "mllama":
        return MllamaProcessor(MllamaImageProcessor(size=size, max_image_tiles=4), tokenizer, template)
    patches = PixtralImageProcessor(size={"longest_edge": IMAGE_SIZE}, patch_size=PATCH_SIZE)
    return PixtralProcessor(patches, tokenizer, patch_size=PATCH_SIZE, chat_template=template)


def pictured():
    """Conversations with one and with two images, of different lengths."""
    return [examples()[2], examples()[0]]


@pytest.mark.parametrize("name", ["gemma3", "mllama", "pixtral"])
def test_processors_that_count_images_by_text_learn_the_answers(name):
    processor = family_processor(name)

    batch = ConversationCollator(processor)(pictured())

    assert [decode_labels(processor, row) for row in batch["labels"]] == [
        "x<|im_end|>",
        "A réd 🙂.<|im_end|>yes<|im_end|>",
    ]
    longest = int(batch["attention_mask"].sum(dim=1).max())
    per_token = {"input_ids", "attention_mask", "labels", "token_type_ids", "cross_attention_mask"} & set(batch)
    assert all(batch[key].shape[:2] == (2, longest) for key in per_token)
    assert (batch["attention_mask"][0].diff() <= 0).all()  # padded on the right, whatever the tokenizer does alone


@pytest.mark.parametrize(
    ("name", "marks"),
    [("gemma3", ["<boi>", "<soft>"]), ("mllama", ["<|image|>"]), ("pixtral", ["[IMG]", "[IMG_BREAK]", "[IMG_END]"])],
)
def test_no_text_brings_tokens_of_images(name, marks):
    """A model would look for as many more features of images."""
    processor = family_processor(name)
    plain, marked = (
        ConversationCollator(processor)([conversation(f"<image>{text}", text, images=[tiny_image()])])
        for text in ("a", " ".join(marks))
    )

    for token in marks:
        number = processor.tokenizer.convert_tokens_to_ids(token)
        assert (plain["input_ids"] == number).sum() == (marked["input_ids"] == number).sum()


@pytest.mark.parametrize("name", ["gemma3", "mllama"])
@pytest.mark.parametrize("text_first", [False, True])
def test_text_alone_may_stand_beside_images_where_these_are_counted_by_text(name, text_first):
    processor = family_processor(name)
    pair = [examples()[2], examples()[1]]

    batch = ConversationCollator(processor)(pair[::-1] if text_first else pair)

    # A conversation with images comes first.
    assert [decode_labels(processor, row) for row in batch["labels"]] == [
        "x<|im_end|>",
        "Hello <b>you</b>!<|im_end|>",
    ]
    if name == "mllama":
        assert batch["cross_attention_mask"][0].any() and not batch["cross_attention_mask"][1].any()
        assert batch["aspect_ratio_mask"][..., 0].all()  # attention over no tile at all would not be finite


def test_the_cross_attention_of_llama_follows_the_cut():
    collator, short = (ConversationCollator(family_processor("mllama"), max_length) for max_length in (None, 23))

    whole, cut = collator(pictured()[:1]), short(pictured()[:1])

    assert cut["input_ids"].shape[1] == 23 < whole["input_ids"].shape[1]
    assert torch.equal(cut["cross_attention_mask"], whole["cross_attention_mask"][:, :23])


def test_a_processor_that_adds_to_the_text_unasked_is_an_error():
    processor = family_processor("mllama")
    processor.chat_template = processor.chat_template.replace("{{ bos_token }}", "")

    with pytest.raises(ValueError, match="adds to the text .*set `model.chat_template`"):
        ConversationCollator(processor)(pictured())


def test_paligemma_which_takes_one_answer_refuses_conversations():
    image_processor = tiny_image_processor()
    image_processor.image_seq_length = 16
    tokenizer = tiny_tokenizer()
    tokenizer.image_token, tokenizer.image_token_id = "<image>", tokenizer.convert_tokens_to_ids("<image>")
    tokenizer.chat_template = None
    processor = PaliGemmaProcessor(image_processor, tokenizer)

    with pytest.raises(ValueError, match="PaliGemmaProcessor answer one prompt and know no conversation"):
        ConversationCollator(processor)(pictured())
