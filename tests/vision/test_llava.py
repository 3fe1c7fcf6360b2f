"""A LLaVA of a language model and a tower trains, saves and comes back; towers are found in every model."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    VipLlavaConfig,
)

from deem_plugin.vision import assemble_llava, find_tower
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


def prompt(tower):
    """Inputs with as many image tokens as the tower gives for one picture."""
    config = tower.config
    pixel_values = torch.randn(1, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([[1] + [IMAGE] * config.num_image_tokens + [10, 11, 12]])
    return {"pixel_values": pixel_values, "input_ids": ids}


def llava_of_parts(tower, folder):
    return assemble_llava(tiny_llama(folder / "llama"), TOKENIZER, tower)


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


def test_a_llava_gets_another_tower_and_keeps_its_language_model():
    vlm, processor = tiny_llava()
    before = {name: value.clone() for name, value in vlm.model.language_model.named_parameters()}
    tower = tiny_tower("convnext")

    model, _ = assemble_llava(vlm, processor.tokenizer, tower)

    assert find_tower(model) is tower
    assert model.model.multi_modal_projector.linear_1.weight.shape[1] == tower.config.hidden_size
    assert not any(parameter.is_meta for parameter in model.parameters())
    for name, parameter in model.model.language_model.named_parameters():
        assert torch.equal(parameter, before[name])
    assert model.eval().generate(**prompt(tower), max_new_tokens=1, do_sample=False).shape[0] == 1


def test_other_models_keep_their_tower():
    config = VipLlavaConfig(
        vision_config=CLIPVisionConfig(**VIT), text_config=LlamaConfig(**TEXT), image_token_index=IMAGE
    )
    with pytest.raises(ValueError, match="of a LLaVA can be exchanged, and this is a VipLlava"):
        assemble_llava(AutoModelForImageTextToText.from_config(config), TOKENIZER, tiny_tower("clip"))


def test_the_tower_checkpoints_when_the_model_is_told_to(tmp_path):
    tower = tiny_tower("convnext")
    model, _ = llava_of_parts(tower, tmp_path)
    model.gradient_checkpointing_enable()
    assert all(stage.grad_checkpointing for stage in tower.encoder.trunk.stages)
    model.gradient_checkpointing_disable()
    assert not any(stage.grad_checkpointing for stage in tower.encoder.trunk.stages)


def test_attention_implementation_reaches_the_encoder(tmp_path):
    model, _ = llava_of_parts(tiny_tower("clip"), tmp_path)
    model.save_pretrained(tmp_path)
    for implementation in ("sdpa", "eager"):
        loaded = type(model).from_pretrained(tmp_path, attn_implementation=implementation)
        assert loaded.model.vision_tower.encoder.model.config._attn_implementation == implementation


@pytest.mark.parametrize(
    ("encoder", "options"), [("convnext", {}), ("siglip", {}), ("clip", {}), ("convnext", RESAMPLER)]
)
def test_llava_of_parts_trains_and_comes_back(encoder, options, tmp_path):
    language_model = tiny_llama(tmp_path / "llama")
    expected = logits(language_model, {"input_ids": torch.tensor([[1, 10, 11]])})
    tower = tiny_tower(encoder, **options)
    model, processor = assemble_llava(language_model, TOKENIZER, tower)
    assert torch.equal(logits(model, {"input_ids": torch.tensor([[1, 10, 11]])}), expected)

    inputs = prompt(tower)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    model.train()(**inputs, labels=labels).loss.backward()
    first = tower.get_input_embeddings()
    assert sum(p.grad.abs().sum() for p in first.parameters()) > 0

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


@pytest.mark.parametrize("options", [{}, RESAMPLER], ids=["patches", "queries"])
def test_llava_of_parts_gets_a_processor_that_agrees(options, tmp_path):
    tower = tiny_tower("convnext", **options)
    model, processor = assemble_llava(tiny_llama(tmp_path), tiny_tokenizer(), tower)
    images = [Image.new("RGB", (100, 60), "red"), Image.new("RGB", (60, 100), "blue")]
    inputs = processor(images=images, text=["<image>what?", "<image>what?"], return_tensors="pt")
    expected = options.get("num_queries", 16)
    assert (inputs["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [expected, expected]
    assert model.eval().generate(**inputs, max_new_tokens=1).shape[0] == 2
