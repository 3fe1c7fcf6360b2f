import copy
import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from transformers import AutoImageProcessor, TrainerCallback

from deem_plugin.planning.flops import flop_counter
from deem_plugin.planning.memory import GIB
from deem_plugin.planning.plan import fit, least, make_plan
from deem_plugin.planning.report import as_json, main, report
from deem_plugin.planning.skeleton import build_skeleton
from deem_plugin.training.parts import count_parameters
from deem_plugin.training.recipes import load_recipe
from deem_plugin.training.run import _prepare_encoder, _prepare_vlm

from ..families.builders import picture
from ..published_configs import write_configs
from ..training.checkpoints import write_checkpoint
from ..training.helpers import tiny_overrides

# Recipes with tiny parts: name, settings, whether there is feedback, or the section that it has.
RECIPES = {
    "full": ("tiny-tune", {"model__model": "llava"}, True),
    "frozen": ("tiny-tune", {"model__model": "llava", "model__freeze": "[language_model]"}, True),
    "checkpointing": ("tiny-tune", {"model__model": "llava", "training__activation_checkpointing": "true"}, True),
    "bf16": (
        "tiny-tune",
        {"model__model": "llava", "training__bf16": "true", "feedback__diffusion_model__dtype": "bfloat16"},
        True,
    ),
    "baseline": ("llava-1.5-7b-baseline", {"model__model": "llava", "model__learning_rates": "{}"}, False),
    "lora": ("llava-1.5-7b-feedback-lora", {"model__model": "llava", "model__lora__r": 2}, True),
    "mounted": ("tiny-tune", {"model__model": "llava", "model__vision_tower": "deem:{clip}"}, True),
    "align": ("llava-1.5-7b-align", {"model__language_model": "llama", "model__vision_tower": "deem:{clip}"}, False),
    "encoder": ("deem", {"model__encoder": "clip"}, True),
    "ross": ("ross", {"model__model": "llava"}, "ross"),
}


@pytest.fixture(scope="session")
def pictures_only(parts):
    """The conversations about pictures alone, so that every batch has as many pictures as conversations."""
    records = [record for record in json.loads((parts / "data.json").read_text()) if "image" in record]
    (parts / "pictures.json").write_text(json.dumps(records))
    return parts / "pictures.json"


def recipe_of(case, parts, out, data=None, **more):
    """Loads one of `RECIPES`."""
    name, settings, feedback = RECIPES[case]
    settings = {
        key: value.format(clip=parts / "clip")
        if "{clip}" in value
        else parts / value
        if (parts / value).exists()
        else value
        for key, value in settings.items()
        if isinstance(value, str)
    } | {key: value for key, value in settings.items() if not isinstance(value, str)}
    data = parts / "images" if case == "encoder" else data or parts / "data.json"
    training = {"data__path": data, "training__max_steps": 1, "training__save_strategy": "'no'", **more}
    section = "feedback" if feedback is True else feedback or None
    return load_recipe(name, tiny_overrides(parts, out, section, **{**settings, **training}))


class Probe(TrainerCallback):
    """Counts and weighs the first step of a real run."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.counter = flop_counter()
        self.counter.__enter__()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.counter.__exit__(None, None, None)
        self.flops = self.counter.get_total_flops()
        self.gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.weights = sum(p.nbytes for p in model.parameters())
        states = optimizer.state_dict()["state"].values()
        self.optimizer = sum(v.nbytes for state in states for v in state.values() if isinstance(v, torch.Tensor))
        self.trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])


def run_one_step(recipe):
    """Trains one step; returns the probe, the Trainer and the length of the batch's conversations."""
    prepare = _prepare_encoder if recipe.model.encoder else _prepare_vlm
    trainer, _ = prepare(recipe, None)
    probe, lengths = Probe(), []
    trainer.add_callback(probe)
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1] if "input_ids" in kwargs else 0),
        with_kwargs=True,
    )
    attached = tensors_of(trainer.model), count_parameters(trainer.model)
    trainer.train()
    return probe, trainer, lengths[0], attached


def tensors_of(model):
    """What there is of a model: the conditioner is a part of it while it trains."""
    return [(name, p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()]


def quick(case):
    """Marks all but one case as slow."""
    return case if case == "full" else pytest.param(case, marks=pytest.mark.slow)


@pytest.mark.parametrize("case", map(quick, RECIPES))
def test_the_plan_is_what_a_real_step_counts_and_weighs(case, parts, pictures_only, tmp_path):
    recipe = recipe_of(case, parts, tmp_path, pictures_only)
    skeleton = build_skeleton(copy.deepcopy(recipe))
    probe, _, tokens, attached = run_one_step(copy.deepcopy(recipe))

    plan = make_plan(recipe, gpus=[1], tokens=tokens or None)

    assert tensors_of(skeleton.model) == attached[0]
    parameters = {
        part: row for part, row in plan.parameters.items() if part not in ("denoiser", "autoencoder", "anchor")
    }
    assert parameters == attached[1]
    assert sum(row[0] for row in plan.parameters.values()) == probe.trained
    assert plan.flops.total == probe.flops
    memory = plan.rows[0].memory
    assert (memory.weights, memory.gradients, memory.optimizer) == (probe.weights, probe.gradients, probe.optimizer)


@pytest.mark.slow
def test_the_share_of_the_feedback_is_what_it_adds_to_a_step_without(parts, pictures_only, tmp_path):
    with_feedback = recipe_of("full", parts, tmp_path, pictures_only)
    without = recipe_of("full", parts, tmp_path, pictures_only, feedback__weight=0)
    probe, _, tokens, _ = run_one_step(without)

    flops = make_plan(with_feedback, gpus=[1], tokens=tokens).flops

    assert flops.without_feedback == probe.flops
    assert flops.encoding > 0 and flops.denoising > 0


@pytest.mark.slow
def test_the_diffusion_model_is_counted_as_it_is_loaded(parts, tmp_path):
    from deem_plugin.feedback.diffusion_model import load_diffusion_model

    recipe = recipe_of("bf16", parts, tmp_path)
    plan = make_plan(recipe, gpus=[1])

    diffusion_model = load_diffusion_model(recipe.feedback.diffusion_model.path, "bfloat16")
    networks = {"denoiser": diffusion_model.denoiser.model, "autoencoder": diffusion_model.codec.vae}
    for name, network in networks.items():
        assert plan.parameters[name] == [0, sum(p.numel() for p in network.parameters())]
    loaded = sum(p.nbytes for network in networks.values() for p in network.parameters())
    assert plan.rows[0].memory.diffusion_model == loaded


@pytest.mark.slow
def test_a_larger_batch_and_no_checkpointing_hold_more(parts, tmp_path):
    def activations(case, **settings):
        return make_plan(recipe_of(case, parts, tmp_path, **settings), gpus=[1]).rows[0].memory.activations

    full = activations("full")
    assert activations("full", training__per_device_train_batch_size=1) < 0.3 * full
    assert activations("checkpointing") < full


def test_the_7b_recipe_has_the_published_sizes_and_allocates_nothing(tmp_path):
    write_configs(tmp_path)
    overrides = [f"model.model={tmp_path / 'llava-1.5-7b'}"]
    overrides += [f"feedback.diffusion_model.path={tmp_path / 'stable-diffusion-2-1-base'}", "training.bf16=false"]
    recipe = load_recipe("llava-1.5-7b-feedback", [*overrides, "training.tf32=null"])
    before = resident_bytes()

    skeleton = build_skeleton(recipe)

    assert resident_bytes() - before < 0.5 * GIB
    assert skeleton.image_tokens == 576
    counts = count_parameters(skeleton.model)
    conditioner = counts.pop("feedback_conditioner")
    assert sum(map(sum, counts.values())) == 7_063_427_072  # what the hub says of llava-hf/llava-1.5-7b-hf
    assert conditioner[0] > 0 and conditioner[1] == 0
    denoiser, vae = skeleton.diffusion_model.denoiser.model, skeleton.diffusion_model.codec.vae
    assert sum(p.numel() for p in denoiser.parameters()) == 865_910_724  # of Stable Diffusion 2.1
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_the_whole_plan_of_7b_takes_little_memory(tmp_path):
    write_configs(tmp_path)
    command = [sys.executable, "-c", WATCHED, "plan", "llava-1.5-7b-feedback"]
    command += [f"model.model={tmp_path / 'llava-1.5-7b'}"]
    command += [f"feedback.diffusion_model.path={tmp_path / 'stable-diffusion-2-1-base'}"]
    command += ["--gpu", "a100-40", "--json", str(tmp_path / "plan.json")]

    done = subprocess.run(command, capture_output=True, text=True, check=True)

    assert int(done.stderr.strip().splitlines()[-1]) < 2 * GIB
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert 0.01 < plan["flops"]["total"] / plan["flops"]["without_feedback"] - 1 < 0.14
    assert "fits" in done.stdout


# By the process's own peak: `ru_maxrss` begins with that of the process that started it.
WATCHED = """
import re, sys
from deem_plugin.cli import main
status = main()
print(1024 * int(re.search("VmHWM:\\\\s*(\\\\d+)", open("/proc/self/status").read())[1]), file=sys.stderr)
sys.exit(status)
"""


def test_a_language_model_needs_its_config_alone(parts, tmp_path):
    for name in ("llama", "clip"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((parts / name / "config.json").read_text())
    settings = {"model__language_model": tmp_path / "llama", "model__vision_tower": f"deem:{tmp_path / 'clip'}"}
    overrides = tiny_overrides(parts, tmp_path / "out", feedback=None, **settings)

    plan = make_plan(load_recipe("llava-1.5-7b-align", overrides), gpus=[1])

    vocabulary = json.loads((tmp_path / "llama" / "config.json").read_text())["vocab_size"]
    assert plan.parameters["lm_head"] == [0, (vocabulary + 1) * 32]
    assert len(plan.notes) == 1 and "holds no tokenizer" in plan.notes[0]
    assert plan.notes[0] in report(plan)


def test_a_config_that_cannot_be_read_is_an_error_with_the_remedy(parts, tmp_path):
    recipe = recipe_of("full", parts, tmp_path, model__model="nowhere/at-all")
    with pytest.raises(ValueError, match=r"config of `model.model: nowhere/at-all` cannot be read.*config.json alone"):
        make_plan(recipe)


def test_a_conversation_shorter_than_its_picture_is_an_error(parts, tmp_path):
    with pytest.raises(ValueError, match="16 tokens does not hold its picture, which takes 16"):
        make_plan(recipe_of("full", parts, tmp_path), tokens=16)


def test_an_optimizer_of_unknown_states_is_an_error(parts, tmp_path):
    recipe = recipe_of("full", parts, tmp_path, training__optim="adafactor")
    with pytest.raises(ValueError, match="knows adamw_torch, adamw_torch_fused and sgd"):
        make_plan(recipe)


def tiny_command(parts, tmp_path, feedback="feedback", **settings):
    """Returns the overrides of a tiny recipe for the command."""
    return tiny_overrides(parts, tmp_path, feedback, model__model=parts / "llava", **settings)


def test_the_command_lists_the_gpus_that_it_knows(parts, tmp_path, capsys):
    from deem_plugin.cli import main as deem

    assert deem(["plan", "tiny-tune", "--gpu", "h1000"]) == 1
    error = capsys.readouterr().err
    assert "Unknown GPU 'h1000'" in error and "h100," in error and "--gpu-memory" in error


def test_the_command_prints_the_plan_and_writes_it_as_json(parts, tmp_path, capsys):
    from deem_plugin.cli import main as deem

    file = tmp_path / "out" / "plan.json"
    overrides = tiny_command(parts, tmp_path)
    assert deem(["plan", "tiny-tune", *overrides, "--gpu", "t4", "--gpus", "1", "2", "--json", str(file)]) == 0

    text = capsys.readouterr().out
    for word in ("vision_tower", "denoiser", "autoencoder", "with feedback", "fsdp2", "It fits"):
        assert word in text
    assert "refused: the feedback refuses ZeRO-3" in text
    plan = json.loads(file.read_text())
    for row in plan["rows"]:
        memory = dict(row["memory"])
        assert memory.pop("total") == sum(memory.values())
    assert plan["gpu_memory_gib"] == 14.6


@pytest.mark.slow
def test_options_are_tried_until_one_fits(parts, tmp_path):
    overrides = tiny_command(parts, tmp_path)
    plan = make_plan(load_recipe("tiny-tune", overrides), gpus=[1])
    context = plan.rows[0].memory.context
    beyond = plan.rows[0].memory.total - context

    text = main("tiny-tune", overrides, memory_gib=(context + 0.7 * beyond) / GIB, gpus=[1])
    assert "As it is it takes at least" in text and ", fits" in text
    for setting in ("feedback.diffusion_model.dtype=bfloat16", "activation_checkpointing=true"):
        assert setting in text
    assert "lora.r" not in text

    text = main("tiny-tune", overrides, memory_gib=0.5, gpus=[1])
    for setting in ("per_device_train_batch_size=1 training.gradient_accumulation_steps=4", "model.lora.r=16"):
        assert setting in text
    assert "It does not fit. Take more GPUs" in text


@pytest.mark.slow
def test_a_strategy_that_a_run_would_refuse_is_never_the_answer(parts, tmp_path):
    plan = make_plan(recipe_of("lora", parts, tmp_path), gpus=[2])
    refused = {row.strategy for row in plan.rows if row.refusal}
    assert refused == {"zero3"}
    assert least(plan.rows).strategy not in refused
    assert asdict(plan)["rows"][0]["memory"].items() <= as_json(plan, None)["rows"][0]["memory"].items()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "family"), [("qwen3-vl-feedback-lora", "qwen3_vl"), ("qwen2.5-vl-feedback", "qwen2_5_vl")]
)
def test_a_qwen_is_planned_by_its_configs_for_a_picture_of_a_known_size(name, family, parts, tmp_path):
    write_checkpoint(family, tmp_path / "whole")
    (tmp_path / "model").mkdir()
    for file in ("config.json", "processor_config.json"):
        (tmp_path / "model" / file).write_text((tmp_path / "whole" / file).read_text())
    overrides = tiny_overrides(parts, tmp_path / "out", model__model=tmp_path / "model")
    recipe = load_recipe(name, overrides)

    plan = make_plan(recipe, gpus=[1], tokens=200)

    image_processor = AutoImageProcessor.from_pretrained(tmp_path / "whole")
    grid = image_processor(Image.new("RGB", (448, 448)), return_tensors="pt")["image_grid_thw"]
    assert plan.image_tokens == int(grid.prod()) // 4
    assert plan.notes == ["Supposed are pictures of 448 x 448 pixels."]
    assert plan.flops.without_feedback > plan.flops.denoising > 0 and plan.flops.encoding > 0
    assert plan.rows[0].memory.activations > 0
    fit(plan, name, overrides, [1], limit=1)
    by_lora = [option for option in plan.options if "model.lora.r=16" in option.overrides]
    assert len(by_lora) == (0 if recipe.model.lora.r else 1)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "gemma3", "smolvlm", "lfm2_vl", "mistral3", "pixtral"])
def test_the_plan_of_a_family_is_what_a_real_step_counts(family, parts, tmp_path):
    write_checkpoint(family, tmp_path / "model")
    (tmp_path / "images").mkdir()
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A red square."}]
    for index in range(4):
        picture(448, 448, index)[0].save(tmp_path / "images" / f"{index}.png")
    records = [{"id": index, "conversations": turns, "image": f"{index}.png"} for index in range(4)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    stand_ins = {"model__model": tmp_path / "model", "data__path": tmp_path / "data.json"}
    stand_ins |= {"data__image_dir": tmp_path / "images", "training__max_steps": 1}
    recipe = load_recipe("qwen2.5-vl-feedback", tiny_overrides(parts, tmp_path / "out", **stand_ins))
    probe, _, tokens, _ = run_one_step(copy.deepcopy(recipe))

    plan = make_plan(recipe, gpus=[1], tokens=tokens)

    assert plan.flops.total == probe.flops
    memory = plan.rows[0].memory
    assert (memory.weights, memory.gradients, memory.optimizer) == (probe.weights, probe.gradients, probe.optimizer)


@pytest.mark.slow
def test_a_larger_picture_takes_more_tokens_where_the_model_reads_it_at_its_own_resolution(parts, tmp_path):
    write_checkpoint("qwen2_5_vl", tmp_path / "model")
    recipe = load_recipe(
        "qwen2.5-vl-feedback", tiny_overrides(parts, tmp_path / "out", model__model=tmp_path / "model")
    )
    small, large = (make_plan(recipe, gpus=[1], tokens=2000, picture_size=size) for size in ((112, 112), (224, 112)))

    assert large.image_tokens == 2 * small.image_tokens
    assert large.flops.without_feedback > small.flops.without_feedback
    assert large.notes == ["Supposed are pictures of 224 x 112 pixels."]


@pytest.mark.slow
def test_the_time_of_a_step_is_its_flops_at_the_stated_utilisation(parts, tmp_path, capsys):
    from deem_plugin.cli import main as deem

    file = tmp_path / "plan.json"
    mixed = ["training.bf16=true", "training.gradient_accumulation_steps=3"]
    command = ["plan", "tiny-tune", *tiny_command(parts, tmp_path), *mixed, "--gpus", "1", "--json", str(file)]
    assert deem([*command, "--gpu", "h100"]) == 0

    assert "the FLOPs above at 40% of the maker's 989 TFLOP/s; no data" in capsys.readouterr().out
    plan = json.loads(file.read_text())
    assert plan["estimated_step_seconds"] == pytest.approx(3 * plan["flops"]["total"] / (0.4 * 989e12))
    assert deem([*command, "--gpu-memory", "80"]) == 0 and "Estimated:" not in capsys.readouterr().out
    assert deem([*command, "--picture-size", "0", "4"]) == 1
    assert "`--picture-size` is width and height in pixels" in capsys.readouterr().err


@pytest.mark.slow
def test_a_share_of_the_pictures_costs_its_share_of_the_feedback(parts, tmp_path):
    whole, quarter = (
        make_plan(recipe_of("full", parts, tmp_path, feedback__share=share), gpus=[1]) for share in (1.0, 0.25)
    )

    assert quarter.flops.without_feedback == whole.flops.without_feedback
    assert quarter.flops.encoding == pytest.approx(whole.flops.encoding / 4)
    assert quarter.flops.denoising == pytest.approx(whole.flops.denoising / 4)
    assert quarter.rows[0].memory.activations < whole.rows[0].memory.activations


@pytest.mark.slow
def test_a_quarter_of_the_pictures_and_a_tiny_autoencoder_add_little_to_the_7b_recipe(tmp_path):
    """At 704 tokens, where all pictures and the generator's own autoencoder add 7.6 %."""
    write_configs(tmp_path)
    tiny = tmp_path / "taesd"
    with torch.device("meta"):
        AutoencoderTiny().save_config(tiny)
    overrides = [f"model.model={tmp_path / 'llava-1.5-7b'}", "training.use_cpu=true", "training.tf32=null"]
    overrides += [f"feedback.diffusion_model.path={tmp_path / 'stable-diffusion-2-1-base'}"]
    overrides += [f"feedback.diffusion_model.autoencoder={tiny}", "feedback.share=0.25"]

    flops = make_plan(load_recipe("llava-1.5-7b-feedback", overrides), gpus=[1], tokens=704).flops

    assert 0.01 < flops.total / flops.without_feedback - 1 < 0.03


def test_without_an_image_processor_the_tokens_of_a_picture_are_not_known(parts, tmp_path):
    write_checkpoint("qwen3_vl", tmp_path / "whole")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    overrides = tiny_overrides(parts, tmp_path / "out", model__model=tmp_path / "model")

    with pytest.raises(ValueError, match="'qwen3_vl', whose image processor says how many .*preprocessor_config.json"):
        make_plan(load_recipe("qwen3-vl-feedback-lora", overrides))


@pytest.mark.slow
def test_what_saves_memory_in_the_diffusion_model_is_planned_as_it_works(parts, tmp_path):
    def row(**settings):
        return make_plan(recipe_of("full", parts, tmp_path, **settings), gpus=[1])

    plain, onloaded, recomputed, reduced = (
        row(),
        row(feedback__diffusion_model__cpu_offload="true"),
        row(feedback__diffusion_model__gradient_checkpointing="true"),
        row(feedback__diffusion_model__quantization="bnb_4bit"),
    )

    memory = [plan.rows[0].memory for plan in (plain, onloaded, recomputed, reduced)]
    # Offloaded weights come and go with what the feedback computes, so that they count where its peak is.
    assert memory[1].diffusion_model == 0
    assert memory[0].activations <= memory[1].activations <= memory[0].activations + memory[0].diffusion_model
    assert recomputed.flops.total > plain.flops.total
    assert memory[2].activations <= memory[0].activations
    linear = [0, 0]
    for name, size in linear_layers(parts / "sd"):
        assert "." in name
        linear[0] += 4 * size
        linear[1] += -(-size // 2) + 4 * -(-size // 64)
    assert memory[0].diffusion_model - memory[3].diffusion_model == linear[0] - linear[1] > 0


def linear_layers(folder):
    """Returns name and number of weights of the denoiser's linear layers."""
    from deem_plugin.feedback.diffusion_model import load_diffusion_model

    network = load_diffusion_model(str(folder), weights=False).denoiser.model
    return [(name, m.weight.numel()) for name, m in network.named_modules() if isinstance(m, torch.nn.Linear)]
