"""Scoring and prompting with tokenizers as language models have them, against one forward a token."""

import pytest
import torch
from transformers import (
    GemmaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from deem_plugin.evaluation.chats import read_messages
from deem_plugin.evaluation.vlm import Vlm

from ..text_tokenizers import TOKENIZERS
from ..tiny import (
    IMAGE_SIZE,
    PATCH_SIZE,
    tiny_clip_config,
    tiny_image,
    tiny_image_processor,
    tiny_llama_config,
)

# What stands before the answer: text, a space, a line break, a token of the template.
ENDINGS = ("ASSISTANT:", "ASSISTANT: ", "ASSISTANT:\n", "<answer>")
# What the answer "yes" becomes behind each of them.
YES = {
    "metaspace": ("▁yes", "▁yes", "yes", "▁yes"),
    "bytes": ("Ġyes", "Ġyes", "yes", "Ġyes"),
    "unigram": ("▁yes", "▁yes", "▁yes", "▁yes"),
}


def template(ending: str) -> str:
    """Returns a chat template whose generation prompt ends in `ending`."""
    parts = (
        "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    )
    prompt = ending.replace("\n", "\\n")
    return (
        "{{ bos_token }}{% for message in messages %}USER: " + parts + " {% endfor %}"
        "{% if add_generation_prompt %}{{ '" + prompt + "' }}{% endif %}"
    )


def llava(kind: str, ending: str) -> Vlm:
    tokenizer = TOKENIZERS[kind]()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<answer>"]})
    processor = LlavaProcessor(
        image_processor=tiny_image_processor(),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template(ending),
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=tiny_clip_config(),
        text_config=tiny_llama_config(len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return Vlm(LlavaForConditionalGeneration(config).eval(), processor, batch_size=8)


def chat(text: str, doc_id: int = 0, images=None):
    content = [*({"type": "image", "url": image} for image in images or [])]
    return read_messages([{"role": "user", "content": [*content, {"type": "text", "text": text}]}], "task", doc_id)


def oracle(vlm: Vlm, tokens: list[str], own, target_tokens: int) -> float:
    """Sums log-probabilities one token at a time: each from a forward of what precedes it, and nothing else."""
    ids = vlm.processor.tokenizer.convert_tokens_to_ids(tokens)
    pixels = {}
    if own.images:
        pixels["pixel_values"] = vlm.processor.image_processor(own.images, return_tensors="pt")["pixel_values"]
    total = 0.0
    for end in range(len(ids) - target_tokens, len(ids)):
        with torch.no_grad():
            logits = vlm.model(input_ids=torch.tensor([ids[:end]]), **pixels).logits[0, -1]
        total += logits.log_softmax(-1)[ids[end]].item()
    return total


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kind", YES)
def test_log_likelihood_is_that_of_the_tokens_of_the_answer_whatever_the_prompt_ends_in(kind, ending):
    vlm = llava(kind, ending)
    chats = [chat("is it a cat", 0, [tiny_image(0)]), chat("what is this in the picture", 1, [tiny_image(1)])]
    cases = [(own, target) for own in chats for target in (" yes", " yes and no")]

    scores = vlm.log_likelihoods(*map(list, zip(*cases, strict=True)))

    first = YES[kind][ENDINGS.index(ending)]
    for (own, target), (score, _) in zip(cases, scores, strict=True):
        text = own.render(vlm.processor).replace("<image>", "<image>" * 16)
        tokens = vlm.processor.tokenizer.tokenize(text + (target.strip() if text[-1].isspace() else target))
        count = len(target.split())
        assert tokens[-count] == first
        assert score == pytest.approx(oracle(vlm, tokens, own, count), rel=1e-4)
        assert score < -1


def test_answers_of_one_token_to_one_prompt_are_one_row_and_other_prompts_are_not():
    vlm = llava("metaspace", "ASSISTANT:")
    asked = [chat("is it a cat", 0, [tiny_image(0)]), chat("is it a cat", 1, [tiny_image(1)])]
    rows = []
    vlm.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )

    together = vlm.log_likelihoods([own for own in asked for _ in range(2)], [" yes", " no"] * 2)

    assert rows == [2]
    alone = [vlm.log_likelihoods([own], [target])[0] for own in asked for target in (" yes", " no")]
    assert [score for score, _ in together] == pytest.approx([score for score, _ in alone], rel=1e-4)
    assert len({round(score, 4) for score, _ in alone}) == 4


def test_only_the_logits_of_answers_are_made_and_long_answers_are_split(monkeypatch):
    vlm = llava("bytes", "ASSISTANT:\n")
    asked = [chat("is it a cat " * (1 + index), index, [tiny_image(index)]) for index in range(3)]
    targets = ["yes and no maybe", "no", "a big red dog"]
    made = []
    vlm.model.lm_head.register_forward_hook(lambda module, args, output: made.append(output.shape[:2].numel()))

    whole = vlm.log_likelihoods(asked, targets)
    monkeypatch.setattr("deem_plugin.evaluation.vlm._MAX_LOGITS", 16)
    split = vlm.log_likelihoods(asked, targets)

    assert made[0] <= 3 * 9 and max(made[1:]) <= 16  # of three prompts of 27 tokens and more
    assert [score for score, _ in split] == pytest.approx([score for score, _ in whole], rel=1e-4)


def paligemma(folder=None) -> Vlm:
    """A PaliGemma with its real processor, which writes a line break behind each prompt; saved in `folder`."""
    tokenizer = TOKENIZERS["metaspace"]()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<unk>"})
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = SiglipImageProcessor(size=size, image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2)
    image_processor.image_seq_length = (IMAGE_SIZE // PATCH_SIZE) ** 2
    processor = PaliGemmaProcessor(image_processor, tokenizer)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = SiglipVisionConfig(**sizes, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, vision_use_head=False)
    text = GemmaConfig(
        **sizes,
        vocab_size=len(tokenizer),
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = PaliGemmaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        projection_dim=32,
        tie_word_embeddings=False,
    )
    model = PaliGemmaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    if folder is not None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return Vlm(model, processor, batch_size=8)


def test_paligemma_answers_as_by_itself_and_shares_nothing():
    vlm = paligemma()
    pictures = [tiny_image(0), tiny_image(1)]
    asked = [chat(text, 0, [pictures[k]]) for text, k in (("is this a cat", 0), ("what is it", 0), ("red", 1))]

    answers = vlm.generate(asked, {"max_new_tokens": 5, "do_sample": False})

    assert vlm.shared_prefix.shares is False
    for own, answer in zip(asked, answers, strict=True):
        inputs = vlm.processor(text=f"<image>{own.question}", images=own.images, return_tensors="pt")
        inputs.pop("labels")
        output = vlm.model.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert answer == vlm.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(set(answers)) > 1


def test_paligemma_scores_the_answer_behind_its_line_break_as_in_training():
    """Against its own training inputs (`suffix`): the prompt is seen both ways, the answer causally."""
    vlm = paligemma()
    own = chat("is this a cat", 0, [tiny_image(0)])
    targets = [" yes", " yes and no"]

    scores = vlm.log_likelihoods([own] * 2, targets)

    for target, (score, _) in zip(targets, scores, strict=True):
        inputs = vlm.processor(
            text="<image>is this a cat", suffix=target.strip(), images=own.images, return_tensors="pt"
        )
        answer = (inputs["labels"][0] != -100).nonzero()[:-1, 0]  # but for the end of the sequence
        with torch.no_grad():
            del inputs["labels"]
            log_probs = vlm.model(**inputs).logits[0].log_softmax(-1)
        ids = inputs["input_ids"][0, answer]
        assert vlm.processor.decode(ids) == target.strip()
        expected = log_probs[answer - 1].gather(-1, ids[:, None]).sum().item()
        assert score == pytest.approx(expected, rel=1e-4)
