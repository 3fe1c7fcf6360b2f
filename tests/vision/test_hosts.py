"""Every kind of vision-language model that can hold the tower does, and the others are refused."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AyaVisionConfig,
    CLIPVisionConfig,
    Cohere2Config,
    Cohere2VisionConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    PaliGemmaConfig,
    Qwen2Config,
    SiglipVisionConfig,
    VipLlavaConfig,
)

from deem_plugin.vision import HOSTS, assemble_llava, check_host, find_tower, mount_tower
from tests.tiny import tiny_llama, tiny_llava, tiny_tokenizer
from tests.vision.towers import RESAMPLER, VIT, realigned, tiny_tower

TOKENIZER = tiny_tokenizer()
IMAGE = TOKENIZER.convert_tokens_to_ids("<image>")
TEXT = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 3,
}


def host_config(model_type):
    """A tiny config of each host, with the kind of tower that it usually has. Its images have 32 pixels."""
    clip = {"vision_config": CLIPVisionConfig(**VIT), "text_config": LlamaConfig(**TEXT), "image_token_index": IMAGE}
    siglip = {"vision_config": SiglipVisionConfig(**VIT, vision_use_head=False)}
    cohere = siglip | {"text_config": Cohere2Config(**TEXT)}
    pinpoints = {"image_grid_pinpoints": [[32, 64], [64, 32]]}
    return {
        "llava": lambda: LlavaConfig(**clip),
        "vipllava": lambda: VipLlavaConfig(**clip, vision_feature_layer=[-2, -1]),
        "llava_next": lambda: LlavaNextConfig(**clip, **pinpoints),
        "llava_onevision": lambda: LlavaOnevisionConfig(
            **siglip, text_config=Qwen2Config(**TEXT), image_token_index=IMAGE, **pinpoints
        ),
        "paligemma": lambda: PaliGemmaConfig(
            **siglip,
            text_config=GemmaConfig(**TEXT),
            image_token_index=IMAGE,
            projection_dim=32,
            vocab_size=len(TOKENIZER),
        ),
        "aya_vision": lambda: AyaVisionConfig(**cohere, image_token_index=IMAGE),
        "cohere2_vision": lambda: Cohere2VisionConfig(**cohere, image_token_id=IMAGE, alignment_intermediate_size=64),
    }[model_type]()


def make_host(model_type):
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(host_config(model_type))


def prompt(model_type, tower, tokens=None):
    """Inputs with as many image tokens as the host needs for one picture."""
    config, size = tower.config, tower.config.image_size
    side = config.grid_size
    inputs = {"pixel_values": torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(2))}
    if model_type in ("llava_next", "llava_onevision"):
        # One overview and two tiles; a line of tiles ends with a newline token.
        tokens = side**2 + side * (2 * side + 1)
        inputs = {
            "pixel_values": inputs["pixel_values"][None].repeat(1, 3, 1, 1, 1),
            "image_sizes": torch.tensor([[size, 2 * size]]),
        }
    elif model_type in ("aya_vision", "cohere2_vision"):
        tokens = (side // 2) ** 2
    elif tokens is None:
        cropped = config.class_token and model_type != "paligemma"
        tokens = config.num_image_tokens - cropped
    return inputs | {"input_ids": torch.tensor([[1] + [IMAGE] * tokens + [10, 11, 12]])}


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


def check_host_with_tower(model_type, tower, tmp_path):
    vlm = make_host(model_type)
    language_weights = {name: p.clone() for name, p in vlm.base_model.language_model.named_parameters()}
    model, _ = mount_tower(vlm, tower)

    inputs = prompt(model_type, tower)
    extra = {"token_type_ids": (inputs["input_ids"] == 12).long()} if model_type == "paligemma" else {}
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    model.train()(**inputs, **extra, labels=labels).loss.backward()
    first = tower.get_input_embeddings()
    assert sum(p.grad.abs().sum() for p in first.parameters()) > 0

    assert type(model) is type(vlm)
    assert find_tower(model) is tower and tower.config is model.config.vision_config
    assert not any(p.is_meta for p in model.parameters())
    for name, p in model.base_model.language_model.named_parameters():
        assert torch.equal(p, language_weights[name])

    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(realigned(loaded), inputs), logits(model, inputs))
    generated = loaded.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert generated.shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("model_type", HOSTS)
@pytest.mark.parametrize("encoder", ["convnext", "siglip"])
def test_host_trains_saves_and_generates_with_the_tower(model_type, encoder, tmp_path):
    tower = tiny_tower(encoder, class_token=model_type != "cohere2_vision")
    check_host_with_tower(model_type, tower, tmp_path)


@pytest.mark.parametrize("model_type", [name for name, host in HOSTS.items() if not host.needs_grid])
def test_hosts_without_a_grid_hold_queries(model_type, tmp_path):
    check_host_with_tower(model_type, tiny_tower("clip", **RESAMPLER), tmp_path)


@pytest.mark.parametrize("model_type", [name for name, host in HOSTS.items() if host.crop != "always"])
def test_no_patch_is_lost_without_a_class_token(model_type, tmp_path):
    check_host_with_tower(model_type, tiny_tower("siglip", class_token=False), tmp_path)


def test_projector_is_kept_where_it_fits_and_new_where_not():
    kept = make_host("llava")
    projector = kept.model.multi_modal_projector
    assert mount_tower(kept, tiny_tower("clip"))[0].model.multi_modal_projector is projector
    new = mount_tower(make_host("llava"), tiny_tower("convnext"))[0].model.multi_modal_projector
    assert new.linear_1.weight.shape == (32, 64)
    assert 0.01 < new.linear_1.weight.std() < 0.03


def test_mounted_tower_checkpoints_when_the_host_is_told_to():
    tower = tiny_tower("convnext")
    model, _ = mount_tower(make_host("llava"), tower)
    model.gradient_checkpointing_enable()
    assert all(stage.grad_checkpointing for stage in tower.encoder.trunk.stages)
    model.gradient_checkpointing_disable()
    assert not any(stage.grad_checkpointing for stage in tower.encoder.trunk.stages)


def test_attention_implementation_reaches_the_encoder(tmp_path):
    model, _ = mount_tower(make_host("llava"), tiny_tower("clip"))
    model.save_pretrained(tmp_path)
    for implementation in ("sdpa", "eager"):
        loaded = type(model).from_pretrained(tmp_path, attn_implementation=implementation)
        assert loaded.model.vision_tower.encoder.model.config._attn_implementation == implementation


@pytest.mark.parametrize("model_type", ["internvl", "fast_vlm", "got_ocr2", "perception_lm"])
def test_models_that_cannot_hold_a_tower_are_refused_with_the_reason(model_type):
    config = AutoConfig.for_model(model_type)
    with pytest.raises(ValueError, match=f"'{model_type}' cannot hold another vision tower: it.*use one of: llava"):
        check_host(config)


def test_unknown_models_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="not known whether a model of type 'qwen2_vl'.*llava, vipllava"):
        check_host(AutoConfig.for_model("qwen2_vl"))


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        (
            "llava_next",
            RESAMPLER,
            "square grid, but the tower returns 5 queries.*`num_queries=0`",
        ),
        ("vipllava", {"class_token": False}, "always crops the first token.*`class_token=True`"),
        (
            "cohere2_vision",
            {"class_token": True},
            "starts with a class token.*`class_token=False`",
        ),
        ("aya_vision", {"image_size": 24}, "merges 2 x 2 patches, but the tower's grid has 3.*multiple of 16"),
    ],
)
def test_towers_that_do_not_fit_the_host_are_refused(model_type, options, message):
    with pytest.raises(ValueError, match=message):
        mount_tower(make_host(model_type), tiny_tower("clip", **options))


@pytest.mark.parametrize("options", [{}, RESAMPLER, {"class_token": False}], ids=["patches", "queries", "no class"])
def test_llava_of_parts_trains_and_comes_back(options, tmp_path):
    language_model = tiny_llama(tmp_path / "llama")
    expected = logits(language_model, {"input_ids": torch.tensor([[1, 10, 11]])})
    tower = tiny_tower("convnext", **options)
    model, processor = assemble_llava(language_model, TOKENIZER, tower)
    assert torch.equal(logits(model, {"input_ids": torch.tensor([[1, 10, 11]])}), expected)

    inputs = prompt("llava", tower)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    model.train()(**inputs, labels=labels).loss.backward()
    assert tower.encoder.trunk.stem[0].weight.grad.abs().sum() > 0

    model.save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "llava", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(realigned(loaded), inputs), logits(model, inputs))
    assert AutoProcessor.from_pretrained(tmp_path / "llava").to_dict() == processor.to_dict()


@pytest.mark.parametrize("tie", [True, False])
def test_llava_of_parts_learns_the_image_token(tie, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<unused>"])
    config = LlamaConfig(**TEXT, tie_word_embeddings=tie)
    config.vocab_size = len(tokenizer)
    language_model = AutoModelForCausalLM.from_config(config)
    # A tokenizer that does not know the token under the name that LLaVA uses.
    tokenizer = _without_image_token(tokenizer)
    assert "<image>" not in tokenizer.get_vocab()

    model, processor = assemble_llava(language_model, tokenizer, tiny_tower("clip"))

    assert "<image>" not in tokenizer.get_vocab()
    assert processor.image_token_id == model.config.image_token_id == config.vocab_size - 1
    assert model.get_input_embeddings().num_embeddings == len(processor.tokenizer)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tie
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).lm_head.weight.shape[0] == len(processor.tokenizer)


def _without_image_token(tokenizer):
    import json

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(tokenizer.backend_tokenizer.to_str().replace("<image>", "<picture>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="<|im_end|>"
    )


def test_tower_is_found_in_stock_models_and_behind_peft():
    model, _ = tiny_llava()
    tower = model.model.vision_tower
    assert find_tower(model) is tower
    assert find_tower(model.model) is tower
    assert find_tower(tower) is tower
    peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert find_tower(peft_model) is tower


def test_model_without_a_tower_is_an_error():
    with pytest.raises(ValueError, match="Found no vision tower in LlamaModel"):
        find_tower(AutoModel.from_config(LlamaConfig(**TEXT)))
    with pytest.raises(ValueError, match="Found no vision tower in Linear"):
        find_tower(torch.nn.Linear(2, 2))
