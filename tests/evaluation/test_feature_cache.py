"""Shared image features: the same answers as without, each picture seen once, bounded memory, else the plain path."""

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from deem_plugin.evaluation.feature_cache import FeatureCache
from deem_plugin.evaluation.lmms import DeemChat, DeemSimple

from ..tiny import IMAGE_SIZE, PATCH_SIZE, tiny_clip_config, tiny_image, tiny_llama_config, tiny_llava
from .helpers import request

GREEDY = {"max_new_tokens": 4, "temperature": 0, "do_sample": False, "until": ["\n\n"]}
IMAGE_TOKEN = 4
PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
# Pictures of each document: some alone, some in company, some in no picture's.
PICTURES = [[0], [0], [1, 0], [], [1], [2], [0, 0, 2], [], [2]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    model, processor = tiny_llava()
    with torch.no_grad():
        # Attention that picks among the tokens: with that of the tiny weights, answers hardly depend on the picture.
        for name, weight in model.model.language_model.named_parameters():
            if "self_attn" in name:
                weight *= 10
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def docs():
    """Documents as a data set gives them: each with pictures of its own, some of which look alike."""
    return [
        {"images": [tiny_image(seed, (40, 32)) for seed in seeds], "question": "What is it? " * (1 + index % 3)}
        for index, seeds in enumerate(PICTURES)
    ]


def to_messages(doc):
    parts = [{"type": "image", "url": image} for image in doc["images"]]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": doc["question"]}]}]


def answers(checkpoint, docs, **kwargs):
    """Answers all documents; also returns how many pictures the tower saw."""
    model = DeemChat(pretrained=checkpoint, device="cpu", **kwargs)
    model.task_dict = {"task": {"test": docs}}
    seen = count_pictures(model.vlm.model)
    requests = [request(d["question"], to_messages, dict(GREEDY), i, "task", "test") for i, d in enumerate(docs)]
    return model.generate_until(requests), sum(seen)


def count_pictures(model) -> list[int]:
    seen = []
    model.base_model.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


def test_answers_are_those_of_one_prompt_at_a_time_and_each_picture_is_seen_once(checkpoint, docs):
    alone, seen_alone = answers(checkpoint, docs, batch_size=1, feature_cache_mb=0)

    assert len(set(alone)) > 5 and seen_alone == sum(map(len, PICTURES))
    for batch_size in (1, 2, 9):
        assert answers(checkpoint, docs, batch_size=batch_size) == (alone, 3)


def test_log_likelihoods_are_the_same_with_shared_features(checkpoint, docs):
    scores = []
    for megabytes in (0, 512):
        model = DeemSimple(pretrained=checkpoint, device="cpu", batch_size=4, feature_cache_mb=megabytes)
        model.task_dict = {"task": {"test": docs}}
        seen = count_pictures(model.vlm.model)
        requests = [
            request(doc["question"], target, lambda doc: doc["images"], index, "task", "test")
            for index, doc in enumerate(docs)
            for target in ("yes", "no")
        ]
        scores.append(model.loglikelihood(requests))
    assert [score for score, _ in scores[1]] == pytest.approx([score for score, _ in scores[0]], rel=1e-5)
    assert sum(seen) == 3


def test_a_picture_is_computed_again_only_when_it_was_forgotten():
    """Three pictures, room for two: the one that was used longest ago goes."""
    model, _ = tiny_llava()
    block = PATCHES * model.config.text_config.hidden_size * 4
    cache, seen = FeatureCache(max_bytes=2 * block), count_pictures(model)
    pictures = torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE)

    with torch.no_grad():
        for index in (0, 1, 0, 2, 0, 1):
            cache.share(model, {"pixel_values": pictures[index : index + 1]})
            assert cache.bytes <= 2 * block

    assert len(seen) == 4  # 0, 1, 2, and 1 again, which 2 had replaced


def test_a_batch_with_more_pictures_than_fit_is_whole_and_the_limit_holds():
    model, _ = tiny_llava()
    cache = FeatureCache(max_bytes=1000)
    pictures = torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE)

    with torch.no_grad():
        blocks = cache.share(model, {"pixel_values": pictures})["mm_encoder_outputs"]["image"].pooler_output

    assert len(blocks) == 3 and cache.bytes == 0


def test_pictures_that_differ_in_one_pixel_are_not_taken_for_each_other():
    model, _ = tiny_llava()
    pictures = torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    pictures[1, 2, -1, -1] = 1e-3
    seen = count_pictures(model)

    with torch.no_grad():
        FeatureCache(2**20).share(model, {"pixel_values": pictures})

    assert seen == [2]


def vipllava():
    torch.manual_seed(0)
    config = VipLlavaConfig(
        vision_config=tiny_clip_config(),
        text_config=tiny_llama_config(64),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layers=[-2, -1],
    )
    return VipLlavaForConditionalGeneration(config)


@pytest.mark.parametrize("make", [lambda: tiny_llava()[0], vipllava])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharing_gives_the_logits_and_the_tokens_of_the_plain_path(make, dtype):
    model = make().to(dtype).eval()
    pictures = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE).to(dtype)
    texts = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    ids = torch.cat([torch.full((3, PATCHES), IMAGE_TOKEN), texts], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pictures[[0, 1, 0]]}

    with torch.no_grad():
        shared = FeatureCache(2**20).share(model, inputs)
        features = shared["mm_encoder_outputs"]["image"].pooler_output
        logits = model(**shared).logits
        expected = model(**inputs).logits
        tokens = model.generate(**shared, max_new_tokens=4, do_sample=False, num_beams=2)
        expected_tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=2)

    assert "pixel_values" not in shared and features[0].dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)
    if dtype == torch.float32:
        assert tokens.tolist() == expected_tokens.tolist()


def test_where_sharing_is_not_known_to_be_exact_inputs_stay_as_they_are():
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    llava, _ = tiny_llava()
    next_config = LlavaNextConfig(vision_config=tiny_clip_config(), text_config=tiny_llama_config(64))
    cache = FeatureCache(2**20)
    unknown = SimpleNamespace(config=SimpleNamespace(model_type="something_new"))

    for model, inputs in [
        (LlavaNextForConditionalGeneration(next_config), {"pixel_values": pixels[None], "image_sizes": [[32, 32]]}),
        (unknown, {"pixel_values": pixels}),
        (llava, {"pixel_values": pixels, "image_sizes": torch.tensor([[32, 32]])}),  # as Pixtral's tower needs
        (llava, {"input_ids": torch.tensor([[5, 6]])}),
    ]:
        assert cache.share(model, inputs) is inputs
    inputs = {"pixel_values": pixels}
    assert FeatureCache(0).share(llava, inputs) is inputs
