import pytest
import torch

from deem_plugin.training.arguments import LoraArguments, ModelArguments
from deem_plugin.training.model import add_lora, freeze_unread_layers
from deem_plugin.training.parts import count_parameters, find, freeze, list_parts, matches, parameter_table

from ..families.builders import build
from ..tiny import tiny_llava

PARTS = ["vision_tower", "multi_modal_projector", "language_model", "lm_head"]


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("vision_tower", "model.vision_tower.layers.0.weight", True),
        ("vision_tower", "model.vision_tower_two.weight", False),
        ("tower", "model.vision_tower.weight", False),
        ("layers.1", "model.layers.1.weight", True),
        ("layers.1", "model.layers.11.weight", False),
        ("layers.*.norm", "model.layers.11.norm.weight", True),
        ("layers.*.norm", "model.layers.11.mlp.norm.weight", False),
        ("model.vision_tower", "base_model.model.model.vision_tower.lora_A.weight", True),
    ],
)
def test_patterns_name_whole_parts_of_a_dotted_name(pattern, name, expected):
    assert matches(pattern, name) is expected


def test_parts_are_named_alike_with_and_without_lora():
    model, _ = tiny_llava()
    assert set(list_parts(model)) == set(PARTS)

    wrapped = add_lora(model, ModelArguments(model="m", lora=LoraArguments(r=2)))

    assert set(list_parts(wrapped)) == set(PARTS)


def test_unmatched_patterns_are_errors_that_list_the_parts():
    model, _ = tiny_llava()
    message = "'vision_towr' of `model.freeze` matches no parameter.*vision_tower.*language_model.*lm_head"
    with pytest.raises(ValueError, match=message):
        freeze(model, ["lm_head", "vision_towr"])
    with pytest.raises(ValueError, match="`model.learning_rates` matches no parameter"):
        find(model, "projector", "model.learning_rates")
    for setting in ("modules", "full"):
        with pytest.raises(ValueError, match=f"'visual' of `model.lora.{setting}` matches no parameter"):
            add_lora(model, ModelArguments(model="m", lora=LoraArguments(r=2, **{setting: ["visual"]})))


def test_freezing_leaves_the_other_parts_trainable():
    model, _ = tiny_llava()

    freeze(model, ["language_model", "vision_tower.encoder.layers.0"])

    for name, parameter in model.named_parameters():
        frozen = "language_model" in name or "encoder.layers.0." in name
        assert parameter.requires_grad is not frozen, name


def test_what_the_language_model_never_reads_of_the_tower_is_frozen():
    model, processor = tiny_llava()

    frozen = freeze_unread_layers(model, processor.image_processor)

    # Layer -2 of three layers: the third and the norm of the pooled vector are unused.
    assert frozen and all("layers.2." in name or "post_layernorm" in name for name in frozen)
    ids = processor.tokenizer("<image>" * 16 + "Hi", return_tensors="pt", add_special_tokens=False)["input_ids"]
    model(input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32), labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) is parameter.requires_grad, name


def test_lora_goes_on_the_linear_layers_of_the_named_parts_alone():
    model, processor = tiny_llava()
    arguments = ModelArguments(
        model="m", lora=LoraArguments(2, modules=["language_model", "vision_tower"], full=["multi_modal_projector"])
    )

    wrapped = add_lora(model, arguments)
    freeze_unread_layers(wrapped, processor.image_processor)

    trainable = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    for part in ("language_model", "vision_tower"):
        assert any(part in name and "lora_A" in name for name in trainable)
    assert all("lora_" in name or "multi_modal_projector.modules_to_save" in name for name in trainable)
    assert not any("lm_head" in name or "layers.2." in name for name in trainable)


def test_lora_and_full_training_of_one_part_exclude_each_other():
    arguments = ModelArguments(model="m", lora=LoraArguments(r=2, full=["language_model"]))
    with pytest.raises(ValueError, match="trains in full what `model.lora.modules` puts LoRA on"):
        add_lora(tiny_llava()[0], arguments)


def test_the_table_counts_every_parameter_once():
    model, _ = tiny_llava()
    freeze(model, ["language_model"])

    rows = {line.split()[0]: line.split()[1:] for line in parameter_table(count_parameters(model)).splitlines()}

    assert list(rows) == ["part", *list_parts(model), "total"]
    assert rows["language_model"][0] == "0"
    total = sum(int(value.replace(",", "")) for value in rows["total"])
    assert total == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "with LoRA"])
@pytest.mark.parametrize(("family", "name"), [("smolvlm", "text_model"), ("mllama", "language_model")])
def test_the_language_model_has_a_name_of_its_own_in_every_family(family, name, wrapped):
    model = build(family).model
    if wrapped:
        model = add_lora(model, ModelArguments(model="m", lora=LoraArguments(r=2, modules=["@language_model"])))
        trainable = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
        assert trainable and all(f"model.{name}.layers." in key and "lora_" in key for key in trainable)

    names = find(model, "@language_model", "model.freeze")

    assert names and names == [key for key, _ in model.named_parameters() if f"model.{name}." in key]
    assert find(model, "@language_model.norm", "model.freeze") == [
        f"{'base_model.model.' * wrapped}model.{name}.norm.weight"
    ]


def test_a_language_model_with_the_tower_in_it_has_no_such_name():
    with pytest.raises(ValueError, match="GitForCausalLM has no language model apart from its vision tower"):
        find(build("git").model, "@language_model", "model.freeze")


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "with LoRA"])
def test_the_tower_has_a_name_of_its_own_in_every_family(wrapped):
    """A LLaVA calls it `vision_tower`, a Qwen-VL `visual`."""
    model, _ = tiny_llava()
    if wrapped:
        model = add_lora(model, ModelArguments(model="m", lora=LoraArguments(r=2, modules=["@tower"])))
    names = find(model, "@tower", "model.freeze")
    assert names and names == find(model, "vision_tower", "model.freeze")
    assert find(model, "@tower.embeddings", "model.freeze") == find(model, "vision_tower.embeddings", "model.freeze")
    freeze(model, ["@tower"])
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "vision_tower" in name)
