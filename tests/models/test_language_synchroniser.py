"""The language model's synchroniser, against the official one (fixture F4), in several families, and in generation."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import linear
from torch.utils.checkpoint import CheckpointError
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from deem_plugin.models.language_synchroniser import LanguageModelSynchroniser, decoder_layers
from deem_plugin.models.official import convert_names
from deem_plugin.vision.deformable import image_features

VALUES = {"atol": 1e-5, "rtol": 1e-5}
WIDTH, LAYERS = 12, 3


def _part(weights, prefix):
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def test_hidden_states_and_logits_are_the_official_ones(shared_dir):
    weights = load_file(shared_dir / "parity/f45_weights.safetensors")
    case = load_file(shared_dir / "parity/f4_interleave.safetensors")
    config = LlamaConfig(
        vocab_size=106, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    language_model = LlamaForCausalLM(config).eval()
    decoder = {name: v for name, v in _part(weights, "mm_decoder.").items() if "llama_cross_attn" not in name}
    language_model.model.load_state_dict(decoder, strict=True)
    synchroniser = LanguageModelSynchroniser(64, 2, feature_dim=64, norm_eps=config.rms_norm_eps)
    converted = convert_names({name: value for name, value in weights.items() if "llama_cross_attn" in name})
    synchroniser.load_state_dict(_part(converted.weights, "language_synchroniser."), strict=True)
    flat = case["mmfs_features_mm"].split([64, 16, 4], dim=2)  # maps of 8, 4 and 2 cells a side
    maps = [level.transpose(2, 3).unflatten(3, (side, side)) for level, side in zip(flat, (8, 4, 2), strict=True)]

    with torch.no_grad(), synchroniser.attached(language_model, maps, case["cross_attention_mask"]):
        hidden = language_model.model(
            inputs_embeds=case["mm_embeds"], attention_mask=case["attention_mask"]
        ).last_hidden_state

    torch.testing.assert_close(hidden, case["mm_hidden_state"], **VALUES)
    head = _part(weights, "text_decoder.")
    logits = linear(hidden, head["head.weight"], head["head.bias"])
    logits[..., 100:] += linear(hidden, head["head_new.weight"], head["head_new.bias"])
    torch.testing.assert_close(logits, case["text_logits"], **VALUES)


# Each family's own settings, and the norm that reads the residual stream behind the attention.
FAMILIES = {
    "llama": ({}, "post_attention_layernorm"),
    "qwen2": ({}, "post_attention_layernorm"),
    "gemma2": ({"head_dim": 8}, "pre_feedforward_layernorm"),
    "glm4": ({"head_dim": 8}, "post_attention_layernorm"),
    "gpt_neox": ({"use_parallel_residual": False}, "post_attention_layernorm"),
    "gpt2": ({"n_inner": 64}, "ln_2"),
}


def tiny_language_model(family="llama", **settings):
    """Makes a 3-layer causal language model of width 32 and 40 tokens, any family of transformers."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        **settings,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def tiny_synchroniser(seed=0, gate=0.8, **options):
    """Makes a synchroniser of layers 0 and 2, its gates open."""
    torch.manual_seed(seed)
    options = {"frequency": 2, "num_heads": 4, "num_levels": 2} | options
    synchroniser = LanguageModelSynchroniser(32, LAYERS, WIDTH, **options)
    for block in synchroniser.blocks.values():
        torch.nn.init.constant_(block.gate, gate)
    return synchroniser


def tiny_maps(batch=2, images=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, images, WIDTH, *size, generator=generator) for size in ((5, 7), (3, 4))]


TOKENS = torch.arange(2, 20).reshape(2, 9)
# The first image is seen from token 2 on, the second one, in the first row alone, from token 6 on.
MASK = torch.zeros(2, 9, 2)
MASK[:, 2:, 0] = 1
MASK[0, 6:, 1] = 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_residual_stream_behind_the_attention_takes_the_update_in(family):
    settings, reader = FAMILIES[family]
    language_model, synchroniser, maps = tiny_language_model(family, **settings), tiny_synchroniser(), tiny_maps()
    read = []
    layer = decoder_layers(language_model, LAYERS)[0]
    layer.get_submodule(reader).register_forward_pre_hook(lambda module, args: read.append(args[0]))

    with torch.no_grad():
        language_model(TOKENS)
        with synchroniser.attached(language_model, maps, MASK):
            language_model(TOKENS)
        update = synchroniser.blocks["0"](read[0], image_features(maps, MASK))

    assert update.abs().max() > 1e-3
    torch.testing.assert_close(read[1], read[0] + update, **VALUES)


def test_a_new_synchroniser_changes_nothing_and_its_gates_alone_learn():
    language_model, synchroniser = tiny_language_model(), tiny_synchroniser(gate=0.0)
    plain = language_model(TOKENS).logits

    with synchroniser.attached(language_model, tiny_maps(), MASK):
        logits = language_model(TOKENS).logits
    logits.square().mean().backward()

    assert list(synchroniser.blocks) == ["0", "2"]
    assert torch.equal(logits, plain)
    for name, parameter in synchroniser.named_parameters():
        assert bool(parameter.grad.any()) == name.endswith("gate"), name


def test_gradients_reach_maps_and_parameters_once_the_gates_are_open():
    language_model, synchroniser = tiny_language_model(), tiny_synchroniser()
    maps = [level.requires_grad_() for level in tiny_maps()]

    with synchroniser.attached(language_model, maps, MASK):
        language_model(TOKENS).logits.square().mean().backward()

    assert all(level.grad.any() for level in maps)
    assert all(parameter.grad.any() for parameter in synchroniser.parameters())
    assert not any(level.grad[1, 1].any() for level in maps)  # the image that no token of the second row sees


def test_tokens_before_an_image_do_not_see_it():
    language_model, synchroniser = tiny_language_model(), tiny_synchroniser()
    maps, others = tiny_maps(), tiny_maps(seed=5)

    logits = []
    for seen in (maps, others):
        with torch.no_grad(), synchroniser.attached(language_model, seen, MASK):
            logits.append(language_model(TOKENS).logits)

    torch.testing.assert_close(logits[0][:, :2], logits[1][:, :2])
    assert ((logits[0] - logits[1])[:, 2:].abs().amax(-1) > 1e-5).all()


def _step_by_step(language_model, synchroniser, maps, tokens, mask, steps):
    """Greedy decoding that reads everything anew for each token."""
    for _ in range(steps):
        with synchroniser.attached(language_model, maps, mask):
            new = language_model(tokens, use_cache=False).logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, new], dim=1)
        mask = torch.cat([mask, mask[:, -1:]], dim=1)
    return tokens


@torch.no_grad()
def test_generation_with_a_cache_equals_generation_without():
    language_model, synchroniser, maps = tiny_language_model(), tiny_synchroniser(), tiny_maps()
    expected = _step_by_step(language_model, synchroniser, maps, TOKENS, MASK, steps=6)

    with synchroniser.attached(language_model, maps, MASK):
        generated = language_model.generate(
            TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=6, do_sample=False
        )

    assert torch.equal(generated, expected)


@torch.no_grad()
def test_new_tokens_may_bring_their_own_row_of_the_mask():
    language_model, synchroniser, maps = tiny_language_model(), tiny_synchroniser(), tiny_maps()
    with synchroniser.attached(language_model, maps, MASK):
        expected = language_model(TOKENS).logits

    with synchroniser.attached(language_model, maps, MASK[:, :5]):
        cache = language_model(TOKENS[:, :5], use_cache=True).cache
    for place in range(5, 9):
        with synchroniser.attached(language_model, maps, MASK[:, place : place + 1]):
            step = language_model(TOKENS[:, place : place + 1], use_cache=True, cache=cache)
        torch.testing.assert_close(step.logits[:, 0], expected[:, place], **VALUES)


@torch.no_grad()
def test_a_row_of_a_left_padded_batch_equals_itself_alone():
    language_model, synchroniser, maps = tiny_language_model(), tiny_synchroniser(), tiny_maps()
    padded, seen, attention = TOKENS.clone(), MASK.clone(), torch.ones_like(TOKENS)
    padded[1], seen[1], attention[1] = torch.roll(TOKENS[1], 3), torch.roll(MASK[1], 3, 0), attention[1]
    padded[1, :3], seen[1, :3], attention[1, :3] = 0, 0, 0
    positions = (attention.cumsum(1) - 1).clamp(min=0)

    with synchroniser.attached(language_model, [level[1:] for level in maps], MASK[1:, :6]):
        alone = language_model(TOKENS[1:, :6]).logits
    with synchroniser.attached(language_model, maps, seen):
        batch = language_model(padded, attention_mask=attention, position_ids=positions).logits

    torch.testing.assert_close(batch[1, 3:], alone[0], **VALUES)


def _gradients(language_model, synchroniser):
    maps = [level.requires_grad_() for level in tiny_maps()]
    with synchroniser.attached(language_model, maps, MASK):
        loss = language_model(TOKENS).logits.square().mean()
    loss.backward()  # as a Trainer does, after the model's forward has ended
    gradients = [level.grad for level in maps] + [p.grad.clone() for p in synchroniser.parameters()]
    gradients += [p.grad.clone() for p in language_model.parameters()]
    language_model.zero_grad()
    synchroniser.zero_grad()
    return gradients


def test_gradient_checkpointing_changes_no_gradient():
    language_model, synchroniser = tiny_language_model().train(), tiny_synchroniser()
    expected = _gradients(language_model, synchroniser)

    language_model.activation_checkpointing_enable(
        {"use_reentrant": False, "context_fn": synchroniser.checkpoint_contexts}
    )

    torch.testing.assert_close(_gradients(language_model, synchroniser), expected)
    attention = decoder_layers(language_model, LAYERS)[0].self_attn
    assert len(attention._forward_hooks) == 0


def test_gradient_checkpointing_that_cannot_reach_the_images_fails_loudly():
    language_model, synchroniser = tiny_language_model().train(), tiny_synchroniser()
    language_model.activation_checkpointing_enable()

    with pytest.raises(CheckpointError):
        _gradients(language_model, synchroniser)


def test_the_language_model_is_left_as_it_was_found_even_after_an_error():
    language_model, synchroniser = tiny_language_model(), tiny_synchroniser()
    plain = language_model(TOKENS).logits

    with (
        pytest.raises(ValueError, match=r"must be \(2, 1 or 4, 2\)"),
        synchroniser.attached(language_model, tiny_maps(), MASK),
    ):
        language_model(TOKENS[:, :4])

    assert torch.equal(language_model(TOKENS).logits, plain)


def test_a_model_of_another_depth_is_refused():
    language_model = tiny_language_model()

    with pytest.raises(ValueError, match=r"one list of 8 decoder layers in LlamaForCausalLM, found lists of \[3\]"):
        decoder_layers(language_model, 8)


def test_a_family_whose_layers_are_not_known_is_refused_by_the_names_of_its_parts():
    language_model, synchroniser = tiny_language_model("olmo2"), tiny_synchroniser()

    with (
        pytest.raises(ValueError, match="Olmo2DecoderLayer joins the residual stream is not known.*'self_attn'"),
        synchroniser.attached(language_model, tiny_maps(), MASK),
    ):
        pass
