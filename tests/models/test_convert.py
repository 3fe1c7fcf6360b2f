"""deem convert-official: from the reference's names to a folder that loads, every key accounted for."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig, PreTrainedTokenizerFast

from deem_plugin.cli import main
from deem_plugin.models.convert import convert_official
from deem_plugin.models.official import convert_state_dict

from ..parity_weights import parity_text_config
from .test_parity import VALUES, documents, normalised

START = 100


@pytest.fixture(scope="module")
def weights(shared_dir):
    return load_file(shared_dir / "parity/f45_weights.safetensors")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """Config and tokenizer of the fixture's Llama: 100 tokens, so that the new ones begin at 100."""
    folder = tmp_path_factory.mktemp("llama")
    parity_text_config().save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(100)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w1", eos_token="w2", pad_token="w99"
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["one file", "shards", "torch"])
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
    else:
        torch.save(weights, source := source / "pytorch_model.bin")
    out = tmp_path / "deem"
    arguments = ["--language-model", str(language_model), "--image-size", "64", "--image-decoder-heads", "4"]

    assert main(["convert-official", str(source), str(out), *arguments]) == 0

    model = AutoModelForImageTextToText.from_pretrained(out).eval()
    model.config.official_defects = True
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
    assert model.image_decoder is not None and model.unet_synchroniser is not None
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
    save_file(third, tmp_path / "third.safetensors")

    conversion = convert_official(tmp_path / "third.safetensors", tmp_path / "out", str(language_model), 64)

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    assert model.image_decoder is None and model.feedback_head is None and model.unet_synchroniser is None
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
    ("name", "message"),
    [
        ("visual_tokenizer.pos_embed", "not the fixed 2-D sine-cosine embedding"),
        ("visual_tokenizer.neg_prompt_embeds", "differ, though they are one"),
        ("text_decoder.head.bias", "not zero for the language model's own tokens"),
    ],
)
def test_a_value_that_we_compute_or_share_must_be_ours(weights, name, message):
    with pytest.raises(ValueError, match=message):
        convert_state_dict(weights | {name: weights[name] + 1}, START)


@pytest.mark.parametrize("part", ["sniffer.vision_model.visual.trunk", "perceiver_resampler"])
def test_another_encoder_or_a_part_of_a_model_is_refused(weights, language_model, tmp_path, part):
    others = {name: value for name, value in weights.items() if not name.startswith(f"visual_tokenizer.{part}")}
    save_file(others, tmp_path / "official.safetensors")

    with pytest.raises(ValueError, match=rf"The checkpoint lacks visual_tokenizer.{part}\..* with a ConvNeXt"):
        convert_official(tmp_path / "official.safetensors", tmp_path / "out", str(language_model), 64, 4)


@pytest.mark.parametrize("absent", ["llama_cross_attn", "mmfs_module"])
def test_a_model_without_one_of_the_synchronisers_is_one_without(weights, language_model, tmp_path, absent):
    others = {name: value for name, value in weights.items() if absent not in name}
    save_file(others, tmp_path / "official.safetensors")

    conversion = convert_official(tmp_path / "official.safetensors", tmp_path / "out", str(language_model), 64, 4)

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert (model.language_synchroniser is None) == (absent == "llama_cross_attn")
    assert (model.unet_synchroniser is None) == (absent == "mmfs_module")
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
