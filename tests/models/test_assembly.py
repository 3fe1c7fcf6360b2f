"""assemble_deem: what the parts bring along, and how what is new begins."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from deem_plugin.models.assembly import add_new_tokens, assemble_deem
from deem_plugin.models.losses import next_token_loss
from deem_plugin.vision.deformable import DeformableAttention
from deem_plugin.vision.grids import sincos_positions

from .tiny_deem import language_tokenizer, tiny_language_model, tiny_tower


def test_settings_of_sampling_without_sampling_do_not_keep_a_model_from_being_saved(tmp_path):
    """As published, Vicuna 1.5 has a temperature of 0.9 and top-p of 0.6, but does not sample."""
    tokenizer = language_tokenizer()
    language_model = tiny_language_model(tokenizer)
    language_model.generation_config.update(temperature=0.9, top_p=0.6, max_length=4096)

    model, _ = assemble_deem(language_model, tokenizer, tiny_tower(), context_dim=None)
    model.save_pretrained(tmp_path)

    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).generation_config
    assert loaded.max_length == 4096 and loaded.eos_token_id == [2, model.config.image_start_token_id]
    assert language_model.generation_config.temperature == 0.9


def test_new_tokens_follow_the_tokenizers_own():
    tokenizer = language_tokenizer()
    first = len(tokenizer)

    assert add_new_tokens(tokenizer, ["<box>"]) == {"num_new_tokens": 3, "first_new_token_id": first}
    assert tokenizer.convert_tokens_to_ids(["<image_start>", "<image>", "<box>"]) == [first, first + 1, first + 2]
    with pytest.raises(ValueError, match="already knows .'<image_start>', '<image>'."):
        add_new_tokens(tokenizer)


def test_new_tokens_come_behind_the_highest_id_or_are_refused():
    content = json.loads(language_tokenizer().backend_tokenizer.to_str())
    content["model"]["vocab"]["far"] = 300

    def tokenizer(**added):
        content["added_tokens"].append(content["added_tokens"][0] | added)
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="</s>")

    with pytest.raises(ValueError, match=r"\[260, 261\] among the tokenizer's own, which go up to 300"):
        add_new_tokens(tokenizer(id=1, content="<s>"))
    added = tokenizer(id=300, content="far")
    assert add_new_tokens(added)["first_new_token_id"] == added.convert_tokens_to_ids("<image_start>") == 301


def test_new_linear_layers_start_alike_whatever_their_width():
    torch.manual_seed(0)
    tower = tiny_tower()
    attention = DeformableAttention(64, 8, 8, 2, 1, 1, 2, offset_grid=16, offset_init=3.0)
    attention.reset_parameters()

    for layer in (tower.encoder.class_adapter, tower.position_proj, attention.query):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.15)
        assert not layer.bias.any()


def test_distances_from_a_picture_are_exact():
    """The angles of far tokens are large, and in float32 would be right to fewer digits than the result shows."""
    positions = sincos_positions(2048, 64)

    frequencies = 10000.0 ** -(np.arange(32) / 32)
    angles = np.arange(2048)[:, None] * frequencies
    assert np.abs(positions.numpy() - np.concatenate([np.sin(angles), np.cos(angles)], 1)).max() < 1e-7


def test_a_text_of_which_nothing_is_learned_costs_nothing():
    assert next_token_loss(torch.randn(1, 3, 5), torch.full((1, 3), -100)) == 0
