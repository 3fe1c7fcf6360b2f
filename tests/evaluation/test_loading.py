"""Loading a checkpoint to evaluate: adapters, and clear errors for folders that are none."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from deem_plugin.evaluation.loading import load_vlm

from ..tiny import tiny_llava, tiny_tokenizer


@pytest.fixture
def base(tmp_path):
    tiny_llava(tmp_path / "base")
    return tmp_path / "base"


def test_an_adapter_is_put_on_the_base_model_it_names(base, tmp_path):
    model, processor = load_vlm(str(base))
    config = LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")

    loaded, loaded_processor = load_vlm(str(tmp_path / "adapter"))

    tokens = torch.arange(5, 15)[None]
    with torch.no_grad():
        expected, plain = adapted(input_ids=tokens).logits, load_vlm(str(base))[0](input_ids=tokens).logits
        torch.testing.assert_close(loaded(input_ids=tokens).logits, expected)
    assert not torch.allclose(plain, expected)
    assert type(loaded_processor) is type(processor)
    assert not loaded.training


def test_a_home_folder_is_found_though_no_shell_has_written_it_out(base, tmp_path, monkeypatch):
    """As in `--model_args pretrained=~/base`, where bash leaves the tilde alone."""
    monkeypatch.setenv("HOME", str(tmp_path))

    model, processor = load_vlm("~/base")

    assert model.config._name_or_path == str(base) and processor.tokenizer.pad_token


def test_missing_folders_are_not_taken_for_hub_names(tmp_path):
    with pytest.raises(ValueError, match="No such checkpoint folder: .*/gone"):
        load_vlm(str(tmp_path / "gone"))


def test_a_folder_of_checkpoints_lists_them(base, tmp_path):
    with pytest.raises(ValueError, match="neither config.json nor adapter_config.json.*Checkpoints in it: base"):
        load_vlm(str(tmp_path))


def test_missing_weights_are_refused_instead_of_being_random(base):
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if "vision" in name)
    save_file(
        {key: value for key, value in weights.items() if key != name}, base / "model.safetensors", {"format": "pt"}
    )

    with pytest.raises(ValueError, match="lacks 1 weights of LlavaForConditionalGeneration.*would be random"):
        load_vlm(str(base))


def test_a_checkpoint_without_its_processor_says_how_to_save_it(base):
    for file in base.iterdir():
        if file.name not in ("config.json", "generation_config.json", "model.safetensors"):
            file.unlink()
    with pytest.raises(ValueError, match="No processor found in .*processor.save_pretrained"):
        load_vlm(str(base))

    tiny_tokenizer().save_pretrained(base)
    with pytest.raises(ValueError, match="No processor found in"):
        load_vlm(str(base))
