import json
import logging

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, CLIPModel, TrainerCallback

from deem_plugin.cli import main as command
from deem_plugin.training import run
from deem_plugin.training.recipes import list_recipes, load_recipe, read_sections
from deem_plugin.training.report import MovementCheck
from deem_plugin.training.run import main, train

from .helpers import tiny_overrides

# What each shipped recipe needs beside the tiny parts in general.
STAND_INS = {
    "llava-1.5-7b-align": {"model__language_model": "llama", "model__vision_tower": "deem:{parts}/clip"},
    "ross-align": {"model__language_model": "llama", "model__vision_tower": "deem:{parts}/clip"},
}
# Recipes that train an encoder alone; the later stage of two has no earlier one to start from here.
ENCODERS = (
    "deem",
    "diva",
    "dcr-align",
    "dcr",
    "genhancer",
    "encoder-sd3",
)
WITHOUT_FEEDBACK = ("llava-1.5-7b-align", "llava-1.5-7b-baseline")


# The model that a recipe starts from, where it is no LLaVA.
START = {"deem": "clip", "dcr": "clip"}


def recipe_for(name, parts, out, path=None, **settings):
    """Loads a shipped recipe, or one like it at `path`, with tiny parts in place of the big ones."""
    stand_ins = {}
    start = {"model__encoder": "clip", "data__path": "images"} if name in ENCODERS else {"model__model": "llava"}
    for key, value in STAND_INS.get(name, start).items():
        stand_ins[key] = value.format(parts=parts) if "{" in value else parts / value
    if name in ENCODERS:
        # Compiling takes a minute and quantizing a package: tests/feedback/test_optimizations.py has them.
        without = dict.fromkeys(("feedback__conditioner", "feedback__diffusion_model__quantization"), "null")
        settings = {**without, "feedback__diffusion_model__compile": "false", **settings}
        if name.startswith("diva"):
            # With the class token as many as the tiny text encoder's states.
            settings["feedback__condition__num_patches"] = 7
    if name.endswith("-lora"):
        stand_ins |= {"model__lora__r": 2, "model__lora__alpha": 4}
    section = "ross" if name.startswith("ross") else None if name in WITHOUT_FEEDBACK else "feedback"
    overrides = tiny_overrides(parts, out, section, **{**stand_ins, **settings})
    return load_recipe(path or name, overrides)


def losses(out, key="loss"):
    """Returns the logged values of a run."""
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]


def weights(folder):
    return load_file(folder / "model.safetensors")


def changed(before, after, part):
    """Tells whether any weight of a part differs."""
    names = [name for name in before if part in name and name in after]
    assert names, f"no weights of {part}"
    return any(not torch.equal(before[name], after[name]) for name in names)


def trains_feedback_or_nothing_else(name):
    """Others have their own tests: the interleaved model (test_interleaved.py), denoisers (test_denoiser.py)."""
    sections = read_sections(name)
    return sections.get("deem") is None and sections.get("denoiser") is None


# Run by default; the others are slow.
COMMON_RECIPES = ("tiny-tune", "deem", "dcr", "ross", "llava-1.5-7b-feedback", "qwen3-vl-feedback-lora")


@pytest.mark.parametrize(
    "name",
    [
        name if name in COMMON_RECIPES else pytest.param(name, marks=pytest.mark.slow)
        for name in filter(trains_feedback_or_nothing_else, list_recipes())
    ],
)
def test_every_shipped_recipe_runs_for_two_steps(name, parts, tmp_path):
    final = train(recipe_for(name, parts, tmp_path))

    assert final == tmp_path / "final"
    assert len(losses(tmp_path)) == 2
    fed = name not in WITHOUT_FEEDBACK
    assert len(losses(tmp_path, "feedback_loss")) == (2 if fed else 0)
    assert (final / "feedback.safetensors").is_file() is fed
    assert not any("feedback" in key or "denoiser" in key for key in weights(final))
    if name in ENCODERS:
        return
    model, info = AutoModelForImageTextToText.from_pretrained(final, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(final)
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
        add_generation_prompt=True,
    )
    inputs = processor(text=prompt, images=Image.new("RGB", (40, 30)), return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]


def test_full_training_moves_every_part_and_freezing_keeps_one(parts, tmp_path):
    before = weights(parts / "llava")

    after = weights(train(recipe_for("tiny-tune", parts, tmp_path, model__freeze="[language_model]")))

    assert changed(before, after, "vision_tower") and changed(before, after, "multi_modal_projector")
    assert not changed(before, after, "language_model.model")  # `lm_head` is stored as language_model.lm_head
    assert not changed(before, after, "layers.2.")  # of the tower: what LLaVA does not read


def test_lora_is_saved_merged_and_by_itself(parts, tmp_path):
    from peft import PeftModel

    settings = {"model__lora__full": "[]", "training__learning_rate": 0.1}
    final = train(recipe_for("llava-1.5-7b-feedback-lora", parts, tmp_path, **settings, model__learning_rates="{}"))

    before, after = weights(parts / "llava"), weights(final)
    assert set(before) == set(after)
    assert changed(before, after, "language_model") and changed(before, after, "vision_tower")
    assert not changed(before, after, "multi_modal_projector")
    base = AutoModelForImageTextToText.from_pretrained(parts / "llava")
    merged = PeftModel.from_pretrained(base, final / "adapter").merge_and_unload().state_dict()
    plain = AutoModelForImageTextToText.from_pretrained(final).state_dict()
    for name in plain:
        torch.testing.assert_close(merged[name], plain[name])


def test_a_mounted_tower_comes_back_with_the_model(parts, tmp_path):
    settings = {"model__vision_tower": f"deem:{parts / 'clip'}", "model__num_queries": 0}
    final = train(recipe_for("tiny-tune", parts, tmp_path, **settings))

    model = AutoModelForImageTextToText.from_pretrained(final)
    assert model.config.vision_config.model_type == "deem_vision"


def test_an_encoder_keeps_its_class_and_its_text_tower(parts, tmp_path):
    recipe = recipe_for("deem", parts, tmp_path)
    final = train(recipe)

    model = AutoModel.from_pretrained(final)
    before, after = weights(parts / "clip"), weights(final)
    assert type(model) is CLIPModel
    assert set(before) == set(after)
    assert changed(before, after, "vision_model") and not changed(before, after, "text_model")
    assert (final / "preprocessor_config.json").is_file()


def test_an_encoder_without_feedback_is_an_error(parts, tmp_path):
    overrides = tiny_overrides(parts, tmp_path, model__encoder=parts / "clip") + ["feedback=null"]
    with pytest.raises(ValueError, match="learns from the feedback only"):
        train(load_recipe("deem", overrides))


def test_parts_train_at_their_own_learning_rates(parts, tmp_path):
    rates = "{vision_tower: 0, language_model: 1e-3}"
    before = weights(parts / "llava")

    settings = {"model__learning_rates": rates, "training__learning_rate": 1e-3, "model__freeze": "[]"}
    recipe = recipe_for("llava-1.5-7b-baseline", parts, tmp_path, **settings)
    with pytest.raises(RuntimeError, match="meant to train, but did not move"):
        train(recipe)

    settings["model__freeze"] = "[vision_tower]"
    after = weights(train(recipe_for("llava-1.5-7b-baseline", parts, tmp_path, **settings)))
    assert changed(before, after, "language_model") and not changed(before, after, "vision_tower")


@pytest.mark.parametrize("setting", ["freeze", "lora.modules", "learning_rates"])
def test_unmatched_patterns_stop_the_run_before_it_starts(parts, tmp_path, setting):
    value = "{visual: 1e-3}" if setting == "learning_rates" else "[visual]"
    settings = {f"model__{setting}".replace(".", "__"): value}
    if setting == "lora.modules":
        settings["model__lora__r"] = 2
    with pytest.raises(
        ValueError, match=f"'visual' of `model.{setting}` matches no parameter. The parts .*vision_tower"
    ):
        train(recipe_for("tiny-tune", parts, tmp_path, **settings))
    assert not (tmp_path / "final").exists()


def test_a_frozen_tower_with_feedback_stops_the_run(parts, tmp_path):
    with pytest.raises(ValueError, match="The vision tower .* is frozen"):
        train(recipe_for("tiny-tune", parts, tmp_path, model__freeze="[vision_tower]"))


def test_unwritable_output_stops_the_run_before_anything_is_loaded(parts, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"file/out cannot be written .*Set `training.output_dir`"):
        train(recipe_for("tiny-tune", parts, tmp_path / "file" / "out", model__model="/nowhere"))


@pytest.mark.parametrize("damage", ["missing", "corrupt", "truncated"])
def test_a_broken_picture_stops_the_run_and_leaves_no_model(parts, tmp_path, damage):
    records = json.loads((parts / "data.json").read_text())
    whole = (parts / "images" / "1.png").read_bytes()
    (tmp_path / "images").mkdir()
    for index in range(16):
        data = whole
        if index == 5:
            data = {"missing": None, "corrupt": b"<html>", "truncated": whole[: len(whole) // 2]}[damage]
        if data is not None:
            (tmp_path / "images" / f"{index}.png").write_bytes(data)
    (tmp_path / "data.json").write_text(json.dumps(records))
    settings = {"data__path": tmp_path / "data.json", "data__image_dir": tmp_path / "images", "training__max_steps": 4}

    with pytest.raises(ValueError, match="5.png (of record 5 .* does not exist|cannot be read)"):
        train(recipe_for("tiny-tune", parts, tmp_path / "out", **settings))
    assert list((tmp_path / "out").glob("*checkpoint*")) == [] and not (tmp_path / "out" / "final").exists()


class Interrupt(TrainerCallback):
    """Ends a run as Ctrl-C does, in its fourth step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "name",
    [
        "tiny-tune",
        "deem",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("dcr", "llava-1.5-7b-feedback-lora")),
    ],
)
def test_resuming_gives_the_weights_of_an_uninterrupted_run(parts, tmp_path, name, monkeypatch):
    settings = {"training__save_strategy": "steps", "training__save_steps": 2, "training__max_steps": 4}
    if name == "dcr":
        settings["data__crop_area"] = "null"  # random crops are not repeated
    whole = train(recipe_for(name, parts, tmp_path / "one", **settings))

    recipe = recipe_for(name, parts, tmp_path / "two", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(MovementCheck, "on_step_begin", Interrupt.on_step_begin)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    assert not (tmp_path / "two" / "final").exists()
    resumed = train(recipe_for(name, parts, tmp_path / "two", training__resume_from_checkpoint="last", **settings))

    assert len(losses(tmp_path / "two")) == 4
    for file in ("model.safetensors", "feedback.safetensors"):
        one, two = load_file(whole / file), load_file(resumed / file)
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert changed(weights(parts / START.get(name, "llava")), weights(whole), "vision")


def test_a_second_stage_goes_on_with_the_conditioner_of_the_first(parts, tmp_path):
    first = train(recipe_for("tiny-align", parts, tmp_path / "first"))
    second = {"model__model": first, "model__learning_rates": "{feedback_conditioner: 0.0}", "feedback__seed": 7}
    last = train(recipe_for("tiny-tune", parts, tmp_path / "second", **second))

    one, two = load_file(first / "feedback.safetensors"), load_file(last / "feedback.safetensors")
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_conditioner_of_other_settings_is_an_error_with_the_remedy(parts, tmp_path):
    first = train(recipe_for("tiny-align", parts, tmp_path / "first"))
    other = recipe_for("tiny-tune", parts, tmp_path / "second", model__model=first, feedback__condition__num_queries=3)
    with pytest.raises(ValueError, match="move the file feedback.safetensors"):
        train(other)


def test_resuming_from_nothing_starts_anew_and_from_a_wrong_folder_is_an_error(parts, tmp_path):
    train(recipe_for("tiny-tune", parts, tmp_path, training__resume_from_checkpoint="last"))
    with pytest.raises(ValueError, match="no checkpoint nowhere to resume from"):
        train(recipe_for("tiny-tune", parts, tmp_path, training__resume_from_checkpoint="nowhere"))


def test_resuming_with_other_parameters_is_an_error_that_names_the_checkpoint(parts, tmp_path):
    settings = {"training__save_strategy": "steps", "training__save_steps": 1}
    train(recipe_for("tiny-tune", parts, tmp_path, **settings, training__max_steps=1))
    path = tmp_path / "without.yaml"
    path.write_text("extends: tiny-tune\nfeedback: null\n")
    other = recipe_for("llava-1.5-7b-baseline", parts, tmp_path, path, training__resume_from_checkpoint="last")
    with pytest.raises(ValueError, match="checkpoint-1 cannot go on, it trained other parameters: loaded state"):
        train(other)


@pytest.mark.parametrize(
    "setting",
    [
        "report_to=wanbd",
        "dataloader_persistent_workers=true",
        "train_sampling_strategy=group_by_length",
        "adam_beta1=2",
    ],
)
def test_what_transformers_refuses_of_the_settings_is_no_bug(parts, tmp_path, capsys, setting):
    overrides = tiny_overrides(parts, tmp_path, None, model__model=parts / "llava")
    assert command(["train", "tiny-tune", *overrides, "feedback=null", f"training.{setting}"]) == 1
    assert "deem train: The section `training` cannot be used: " in capsys.readouterr().err


def test_the_command_reports_the_parts_and_where_the_model_is(parts, tmp_path, caplog):
    overrides = tiny_overrides(parts, tmp_path, model__model=parts / "llava")
    with caplog.at_level(logging.INFO, logger="deem_plugin"):
        assert main("tiny-tune", overrides) == 0

    assert "vision_tower" in caplog.text and "trainable" in caplog.text
    assert f"Saved {tmp_path / 'final'}; evaluate it with `deem eval {tmp_path / 'final'}`." in caplog.text


def test_an_encoder_alone_is_evaluated_by_another_command(monkeypatch, caplog):
    monkeypatch.setattr(run, "train", lambda recipe: "runs/deem/final")
    with caplog.at_level(logging.INFO, logger="deem_plugin"):
        assert main("deem", ["training.bf16=false", "training.tf32=null"]) == 0

    assert "evaluate it with `deem eval-encoder runs/deem/final --zero-shot IMAGES`" in caplog.text


def test_without_feedback_the_data_and_the_new_weights_are_the_same(parts, tmp_path):
    """Two arms of an experiment differ by the feedback alone: weight 0 computes nothing."""
    fed = train(recipe_for("tiny-tune", parts, tmp_path / "fed", feedback__weight=0))
    overrides = tiny_overrides(parts, tmp_path / "plain", model__model=parts / "llava") + ["feedback=null"]
    plain = train(load_recipe("tiny-tune", overrides))

    one, two = weights(fed), weights(plain)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_encoder_with_lora_is_saved_merged_and_keeps_its_text_tower(parts, tmp_path):
    before = weights(parts / "clip")

    final = train(recipe_for("dcr", parts, tmp_path, training__learning_rate=0.1, feedback__condition__prompt="null"))

    after = weights(final)
    assert set(before) == set(after) and (final / "adapter" / "adapter_model.safetensors").is_file()
    assert changed(before, after, "vision_model.encoder")
    assert not changed(before, after, "text_model") and not changed(before, after, "embedding")
