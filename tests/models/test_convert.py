"""deem convert-official: from the reference's names to a folder that loads, every key accounted for."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig, PreTrainedTokenizerFast

from deem_plugin.cli import main
from deem_plugin.models.convert import convert_official, load_official
from deem_plugin.models.official import convert_state_dict
from deem_plugin.models.official_config import config_options
from experiments.faithful.deem import PublishedDeem

from ..parity_weights import parity_text_config
from .test_parity import VALUES, documents, normalised

START = 100
RESAMPLER = "visual_tokenizer.perceiver_resampler.blip2qformer.encoder.layer."
MMFS = "visual_tokenizer.encoder.mmfs_module."
ATTENTION = "mm_decoder.layers.0.llama_cross_attn.attn."


@pytest.fixture(scope="module")
def weights(shared_dir):
    return load_file(shared_dir / "parity/f45_weights.safetensors")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """Config and tokenizer of the fixture's Llama: 100 tokens, so that the new ones begin at 100."""
    return save_language_model(tmp_path_factory.mktemp("llama"), START)


def save_language_model(folder, num_tokens, **special):
    parity_text_config().save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(num_tokens)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w1", eos_token="w2", pad_token="w97", **special
    ).save_pretrained(folder)
    return folder


def convert(weights, language_model, tmp_path, **options):
    """Converts weights to `tmp_path / "deem"`, loads the model and returns it with the conversion."""
    save_file(weights, tmp_path / "official.safetensors")
    options = {"image_size": 64, "image_decoder_heads": 4} | options
    conversion = convert_official(tmp_path / "official.safetensors", tmp_path / "deem", str(language_model), **options)
    return AutoModelForImageTextToText.from_pretrained(tmp_path / "deem").eval(), conversion


@pytest.mark.parametrize("kind", ["one file", "shards", "torch", "torch before 1.6", "DeepSpeed"])
def test_the_command_writes_a_folder_that_reads_as_the_official_model(
    weights, language_model, tmp_path, shared_dir, kind, capsys
):
    case = load_file(shared_dir / "parity/f4_interleave.safetensors")
    source = tmp_path / "official"
    source.mkdir()
    if kind == "one file":
        save_file(weights, source := source / "model.safetensors")
    elif kind == "shards":
        names = sorted(weights)
        for index in range(3):
            save_file({name: weights[name] for name in names[index::3]}, source / f"model-{index}.safetensors")
    elif kind == "DeepSpeed":
        torch.save({"module": weights, "global_steps": 1}, source := source / "mp_rank_00_model_states.pt")
    else:
        old = kind == "torch before 1.6"
        torch.save(weights, source / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
    out = tmp_path / "deem"
    arguments = ["--language-model", str(language_model), "--image-size", "64", "--image-decoder-heads", "4"]

    assert main(["convert-official", str(source), str(out), *arguments]) == 0

    model = PublishedDeem.from_pretrained(out).eval()
    ids = case["text_ids"]
    output = model(
        ids,
        case["attention_mask"],
        pixel_values=normalised(case["image_tensors"], model.config.vision_config),
        document_ids=documents(ids),
    )
    torch.testing.assert_close(output.logits, case["text_logits"], **VALUES)
    processor = AutoProcessor.from_pretrained(out)
    assert (processor.image_start_token_id, processor.image_token_id) == (100, 101)
    assert model.denoising.image_decoder is not None and model.denoising.unet_synchroniser is not None
    report = json.loads((out / "conversion.json").read_text())
    assert report["renamed"].keys() | report["ignored"].keys() == weights.keys()
    assert not report["renamed"].keys() & report["ignored"].keys()
    assert f"{len(report['renamed'])} weights used, {len(report['ignored'])} ignored" in capsys.readouterr().out


def test_the_third_stage_has_region_tokens_and_no_diffusion_model(weights, language_model, tmp_path):
    """`mask_align` adds an MLP of the mask's shape and a projection of the pooled maps, and drops all that draws."""
    third = {
        name: value
        for name, value in weights.items()
        if not name.startswith(("image_decoder.", "visual_tokenizer.encoder.", "visual_tokenizer.neg_prompt"))
    }
    shapes = {"mask_feat_linear": (64, 64), "mask_linear.layers.0": (64, 112**2)}
    shapes |= {f"mask_linear.layers.{index}": (64, 64) for index in (1, 2)}
    for name, shape in shapes.items():
        third[f"visual_tokenizer.feature_extractor.{name}.weight"] = torch.randn(shape) * 0.02
        third[f"visual_tokenizer.feature_extractor.{name}.bias"] = torch.randn(shape[0]) * 0.02
    model, conversion = convert(third, language_model, tmp_path)

    assert model.denoising is None
    expected = third["visual_tokenizer.feature_extractor.mask_linear.layers.2.weight"]
    assert torch.equal(model.vision_tower.region_tokens.shape[4].weight, expected)
    assert conversion.ignored["visual_tokenizer.proj_i.weight"].startswith("a head for a diffusion model")
    assert conversion.renamed.keys() | conversion.ignored.keys() == third.keys()
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:40] = 1
    assert model.get_image_features(torch.randn(1, 3, 64, 64), mask).pooler_output.shape == (1, 8, 64)


def test_a_key_without_a_place_is_an_error_that_names_it(weights):
    with pytest.raises(ValueError, match="1 of 1362 weights have no place .* mm_tokenizer.weight"):
        convert_state_dict(weights | {"mm_tokenizer.weight": torch.zeros(1)}, START)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("visual_tokenizer.pos_embed", lambda v: v + 1, "not the fixed 2-D sine-cosine embedding"),
        ("visual_tokenizer.pos_embed", lambda v: v[:-3], r"\(254, 64\) in torch.float32, is not the fixed"),
        ("visual_tokenizer.pos_embed", lambda v: v[0], r"\(64,\) in torch.float32, is not the fixed"),
        (f"{MMFS}mmfs_mid_block.pos_embed", lambda v: v[:2, :3], "pos_embed`, .2, 3. .* is not the fixed"),
        ("visual_tokenizer.clip_mean", lambda v: v + 0.01, "is not CLIP's normalisation, which the image processor"),
        ("visual_tokenizer.clip_std", lambda v: v * 1.1, "is not CLIP's normalisation"),
        ("visual_tokenizer.neg_prompt_embeds", lambda v: v + 1, "differ, though they are one"),
        ("text_decoder.head.bias", lambda v: v + 1, "not zero for the language model's own tokens"),
        (
            "text_decoder.head.weight",
            lambda v: v[:-1],
            r"`text_decoder.head.weight` is \(105, 64\); expected \(106, 64",
        ),
        ("text_decoder.head_new.bias", lambda v: v[0], r"head_new.weight` is \(6, 64\); expected \(1, 64\)"),
        ("mm_decoder.embed_tokens.weight", lambda v: v.flatten(), r"`mm_decoder.embed_tokens.weight` is \(6784,\)"),
        ("mm_decoder.embed_tokens.weight", lambda v: v[:, :32], r"`soi_token` is \(1, 64\); expected \(1, 32\)"),
        ("soi_token", lambda v: v[0], r"`soi_token` is \(64,\); expected \(1, 64\)"),
        ("soi_token", lambda v: v * float("nan"), r"soi_token \(torch.float32, 64 of 64 not finite\)"),
        ("mm_decoder.norm.weight", lambda v: v.int(), r"mm_decoder.norm.weight \(torch.int32"),
        ("mm_decoder.norm.weight", lambda v: v.to(torch.float8_e4m3fn), r"norm.weight \(torch.float8_e4m3fn"),
        ("soi_token", lambda v: v.to_sparse(), r"soi_token \(torch.float32, torch.sparse_coo"),
        ("text_decoder.head.bias", lambda v: v.to("meta"), r"head.bias \(torch.float32, .* on meta"),
    ],
)
def test_a_value_that_we_compute_share_or_add_up_must_be_as_expected(weights, name, change, message):
    with pytest.raises(ValueError, match=message):
        convert_state_dict(weights | {name: change(weights[name])}, START)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("visual_tokenizer.sniffer", "lacks `visual_tokenizer.sniffer.*` among its .* with a ConvNeXt"),
        ("visual_tokenizer.perceiver_resampler", "lacks `visual_tokenizer.perceiver_resampler.queries`"),
        ("visual_tokenizer.sniffer.vision_model.visual.trunk.stages.3", "lacks .*stages.3.blocks.0.norm.weight"),
        ("visual_tokenizer.sniffer.vision_model.visual.trunk.stages.2.blocks.0", r"has the parts \[1\] of .*missing"),
        (f"{RESAMPLER}0.intermediate_query.dense.bias", "lacks .*intermediate_query.dense.bias"),
        (f"{MMFS}mmfs_down_blocks.0.pos_embed", "lacks .*mmfs_down_blocks.0.pos_embed"),
        (f"{MMFS}mmfs_down_blocks.11", "has 11 blocks; expected the 12"),
        (f"{MMFS}mmfs_mid_block", "lacks .*mmfs_mid_block.*"),
        (f"{ATTENTION}sampling_offsets.bias", "lacks .*sampling_offsets.bias"),
    ],
)
def test_a_part_that_is_missing_is_named(weights, lost, message):
    with pytest.raises(ValueError, match=message):
        config_options({name: value for name, value in weights.items() if not name.startswith(lost)}, 64)


@pytest.mark.parametrize(
    "name", [f"{RESAMPLER}0.attention.attention.q_norm.weight", f"{ATTENTION}query_relpos.weight"]
)
def test_a_weight_of_other_dimensions_is_named(weights, name):
    with pytest.raises(ValueError, match=rf"`{name}` is \(\); expected . dimensions"):
        config_options(weights | {name: torch.tensor(1.0)}, 64)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (f"{ATTENTION}attention_weights.weight", lambda v: v[:-1]),
        (f"{MMFS}mmfs_mid_block.conv.weight", lambda v: v[..., 0]),
        (f"{RESAMPLER}1.attention.attention.key.weight", lambda v: v[:-1]),
        ("visual_tokenizer.proj_t.bias", lambda v: v[:-1]),
    ],
)
def test_a_weight_that_does_not_fit_is_named_by_both_names(weights, language_model, tmp_path, name, change):
    with pytest.raises(ValueError, match=rf"\(`{name}`\) is \(.*\) instead of \("):
        convert(weights | {name: change(weights[name])}, language_model, tmp_path)
    assert not (tmp_path / "deem").exists()


@pytest.mark.parametrize("encoder", ["sniffer", "encoder"])
def test_a_vit_is_refused_with_the_reason(weights, encoder):
    """`encoder` is MM-Interleaved's, of the public checkpoint; `sniffer` is that of DEEM."""
    name = f"visual_tokenizer.{encoder}.vision_model.adapter_interactions.0.injector.gamma"

    with pytest.raises(ValueError, match=f"`{name}`: its encoder is a ViT with a ViT-Adapter, .* no counterpart"):
        config_options(weights | {name: torch.zeros(64)}, 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept(weights, language_model, tmp_path, dtype):
    """The authors train in float16, which rounds what we compute and compare by 2.4e-4, bfloat16 by 1.9e-3."""
    model, conversion = convert({name: v.to(dtype) for name, v in weights.items()}, language_model, tmp_path)

    assert {value.dtype for value in model.state_dict().values()} == {model.dtype} == {dtype}
    expected = convert_state_dict(weights, START)
    assert conversion.renamed == expected.renamed and conversion.ignored == expected.ignored
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value.float(), expected.weights[name], atol=1e-7, rtol=torch.finfo(dtype).eps)


def test_each_weight_keeps_its_dtype_and_none_is_rounded_when_it_is_loaded(weights, language_model, tmp_path):
    half = {name: v.half() if name.startswith("mm_decoder.") else v for name, v in weights.items()}

    model, conversion = convert(half, language_model, tmp_path)

    saved = load_file(tmp_path / "deem/model.safetensors")
    assert saved["language_model.model.norm.weight"].dtype == torch.float16
    assert saved["vision_tower.position_proj.weight"].dtype == torch.float32
    assert model.dtype == torch.float32
    for name, value in model.state_dict().items():
        assert torch.equal(value, conversion.weights[name].float()), name


def test_no_weight_is_drawn_before_those_of_the_checkpoint_are_there(weights, language_model, tmp_path):
    """A 7B model with new weights in float32 would take 28 GB beside the checkpoint."""
    save_file(weights, tmp_path / "official.safetensors")
    state = torch.get_rng_state()

    convert_official(tmp_path / "official.safetensors", tmp_path / "deem", str(language_model), 64, 4)

    assert torch.equal(torch.get_rng_state(), state)


def test_a_text_ends_where_a_picture_begins(weights, language_model, tmp_path):
    model, _ = convert(weights, language_model, tmp_path)

    assert model.generation_config.eos_token_id == [2, START]


def test_a_resampler_without_qk_norm_takes_its_heads_from_the_command(weights, language_model, tmp_path):
    plain = {name: v for name, v in weights.items() if not name.endswith(("q_norm.weight", "q_norm.bias"))}
    plain = {name: v for name, v in plain.items() if not name.endswith(("k_norm.weight", "k_norm.bias"))}

    model, _ = convert(plain, language_model, tmp_path, resampler_heads=2)

    attention = model.vision_tower.resampler.layers[0].self_attention
    assert attention.num_heads == 2 and isinstance(attention.q_norm, torch.nn.Identity)
    assert not model.config.vision_config.resampler_qk_norm
    with pytest.raises(ValueError, match="multiple of its number of heads.* num_heads=12"):
        convert(plain, language_model, tmp_path)


def test_the_processor_has_the_chat_template_of_the_tokenizer_or_of_vicuna(weights, language_model, tmp_path):
    convert(weights, language_model, tmp_path)
    content = [{"type": "image"}, {"type": "text", "text": "w3"}]

    processor = AutoProcessor.from_pretrained(tmp_path / "deem")
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    assert text.startswith("w1A chat between a curious human") and text.endswith("USER: <image>\nw3 ASSISTANT:")
    own = save_language_model(tmp_path / "own", START, chat_template="{{ messages[0]['content'] }}")
    convert(weights, own, tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path / "deem")
    assert processor.apply_chat_template([{"role": "user", "content": content}]) == "<image>\nw3"


@pytest.mark.parametrize("tokens", [98, 103])
def test_a_tokenizer_of_another_length_is_refused_with_both_numbers(weights, tmp_path, tokens):
    """With two tokens less, the image start's vector once went to the last but one of the new tokens."""
    other = save_language_model(tmp_path / "llama", tokens)

    with pytest.raises(ValueError, match=f"has 100 tokens of a language model and 6 new .* tokenizer has {tokens}"):
        convert(weights, other, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, r"Image size and heads .* are \(0, 4, 12\); they must be positive"),
        ({"image_decoder_heads": 0}, r"are \(64, 0, 12\)"),
        ({"language_model": "nowhere/at/all"}, "`language_model: nowhere/at/all` cannot be loaded"),
        ({"out": "official.safetensors"}, "official.safetensors is a file; the converted model needs a folder"),
    ],
)
def test_wrong_options_are_told_before_weights_are_read(language_model, tmp_path, options, message):
    save_file({"no": torch.ones(1)}, tmp_path / "official.safetensors")
    out = tmp_path / options.pop("out", "deem")
    given = {"language_model": str(language_model), "image_size": 64, "image_decoder_heads": 4} | options

    with pytest.raises(ValueError, match=message):
        convert_official(tmp_path / "official.safetensors", out, **given)


KINDS = ["text.bin", "junk.safetensors", "objects.bin", "list.bin", "nested.bin", "half.bin", "numbers.bin"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_without_weights_is_named(tmp_path, kind):
    file = tmp_path / kind
    if kind == "objects.bin":
        torch.save({"weights": START, "run": tmp_path}, file)
    elif kind in ("list.bin", "nested.bin", "numbers.bin"):
        one = torch.ones(1)
        torch.save({"list": [one], "nested": {"model": {"weight": one}}, "numbers": {1: one}}[file.stem], file)
    else:
        torch.save({"weight": torch.ones(1)}, file)
        file.write_bytes(file.read_bytes()[:300] if kind == "half.bin" else b"0123456789 no weights at all")

    with pytest.raises(ValueError, match=f"{kind} (cannot be read as weights|holds a)"):
        load_official(file)


def test_weights_in_two_formats_are_refused(weights, tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")

    with pytest.raises(ValueError, match="holds weights twice, in model.safetensors and in pytorch_model.bin"):
        load_official(tmp_path)


def test_the_summary_says_that_a_trained_diffusion_model_is_lost(weights):
    assert "weights do not tell whether it was trained" in convert_state_dict(weights, START).summary()


@pytest.mark.parametrize("absent", ["llama_cross_attn", "mmfs_module"])
def test_a_model_without_one_of_the_synchronisers_is_one_without(weights, language_model, tmp_path, absent):
    others = {name: value for name, value in weights.items() if absent not in name}
    model, conversion = convert(others, language_model, tmp_path)

    assert (model.language_synchroniser is None) == (absent == "llama_cross_attn")
    assert (model.denoising.unet_synchroniser is None) == (absent == "mmfs_module")
    assert conversion.renamed.keys() | conversion.ignored.keys() == others.keys()


def test_what_does_not_fit_the_language_model_is_told_before_anything_is_written(weights, language_model, tmp_path):
    save_file(weights, tmp_path / "official.safetensors")
    other = tmp_path / "llama"
    LlamaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4).save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_text((language_model / name).read_text())

    with pytest.raises(ValueError, match="does not fit a model on .*instead of"):
        convert_official(tmp_path / "official.safetensors", tmp_path / "out", str(other), 64, 4)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="No weights at"):
        convert_official(tmp_path / "nothing", tmp_path / "out", str(other))
