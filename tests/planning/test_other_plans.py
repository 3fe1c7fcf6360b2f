"""Plans of what is no VLM with a feedback: the interleaved model, and a denoiser that trains."""

import copy

import pytest
from torch._subclasses.fake_tensor import FakeTensor

from deem_plugin.planning.flops import DeemCounter, flop_counter
from deem_plugin.planning.plan import make_plan
from deem_plugin.planning.report import report
from deem_plugin.planning.skeleton import build_skeleton
from deem_plugin.training import denoiser
from deem_plugin.training.model import make_model
from deem_plugin.training.parts import count_parameters
from deem_plugin.training.recipes import load_recipe

from ..feedback.tiny_diffusion_models import save_diffusion_model
from ..models.tiny_deem import language_tokenizer, tiny_language_model, tiny_tower
from ..training.helpers import tiny_overrides
from ..training.test_denoiser import overrides as denoiser_overrides
from .test_plan import Probe, tensors_of

TOKENS = 40


@pytest.fixture(scope="module")
def interleaved(tmp_path_factory, parts):
    """Overrides of a tiny interleaved model with all that the paper's has."""
    folder = tmp_path_factory.mktemp("interleaved")
    tokenizer = language_tokenizer()
    tiny_language_model(tokenizer).save_pretrained(folder / "language")
    tokenizer.save_pretrained(folder / "language")
    tiny_tower(multiscale=True).save_pretrained(folder / "tower")
    save_diffusion_model(folder / "diffusion_model", "sd1")
    settings = {
        "model__language_model": folder / "language",
        "model__vision_tower": f"deem:{folder / 'tower'}",
        "model__vision_pretrained": "null",
        "model__image_size": "null",
        "deem__denoiser": folder / "diffusion_model",
        "deem__target_size": 128,
        "data__max_length": TOKENS,
    }
    return tiny_overrides(parts, folder / "out", feedback=None, **settings)


def real_flops(model, inputs):
    """Counts a real micro-batch."""
    with flop_counter() as counter:
        model.train()(**inputs).loss.backward()
    return counter.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["deem-7b-pretrain", "deem-tiny-pretrain"])
def test_the_plan_of_the_interleaved_model_is_what_a_real_micro_batch_counts(stage, interleaved):
    recipe = load_recipe(stage, interleaved)
    skeleton = build_skeleton(copy.deepcopy(recipe))
    model, _ = make_model(copy.deepcopy(recipe.model), recipe.deem)
    if recipe.training.activation_checkpointing:
        model.activation_checkpointing_enable()
    inputs = DeemCounter(skeleton)._inputs(recipe.training.per_device_train_batch_size, TOKENS)

    plan = make_plan(recipe, gpus=[1])

    assert tensors_of(skeleton.model) == tensors_of(model)
    parts = {name: row for name, row in plan.parameters.items() if name not in ("denoiser", "autoencoder")}
    assert parts == count_parameters(model)
    assert plan.flops.total == real_flops(model, inputs)
    model.config.image_weight = model.config.feedback_weight = 0.0
    assert plan.flops.without_feedback == real_flops(model, inputs)
    assert plan.flops.encoding > 0 and plan.flops.denoising > 0
    assert plan.rows[0].memory.weights == sum(p.nbytes for p in model.parameters())
    networks = (model.diffusion_model.denoiser.model, model.diffusion_model.codec.vae)
    assert plan.rows[0].memory.diffusion_model == sum(p.nbytes for network in networks for p in network.parameters())
    assert "the next image and the same image" in report(plan)


@pytest.mark.slow
@pytest.mark.parametrize("autoencoder", [None, "sd"])
def test_the_plan_of_a_denoiser_is_what_a_real_step_counts_and_weighs(autoencoder, parts, tmp_path, monkeypatch):
    settings = {"training__max_steps": 1, "training__save_strategy": "'no'"}
    if autoencoder is not None:
        settings |= {"denoiser__autoencoder": parts / autoencoder, "denoiser__image_size": 16}
    recipe = load_recipe("tiny-denoiser", denoiser_overrides(parts, tmp_path, **settings))
    probe = Probe()

    class Trainer(denoiser.RecipeTrainer):
        def __init__(self, model, **options):
            super().__init__(model=model, **options)
            self.add_callback(probe)
            probe.parameters = count_parameters(model)

    monkeypatch.setattr(denoiser, "RecipeTrainer", Trainer)
    denoiser.train_denoiser(copy.deepcopy(recipe))

    plan = make_plan(recipe, gpus=[1])

    frozen = {"encoder": plan.parameters.pop("encoder")}
    frozen |= {name: plan.parameters.pop(name) for name in ("autoencoder",) if name in plan.parameters}
    assert set(frozen) == {"encoder"} | ({"autoencoder"} if autoencoder else set())
    assert all(row[0] == 0 and row[1] > 0 for row in frozen.values())
    assert plan.parameters == probe.parameters
    assert (plan.flops.without_feedback, plan.flops.total) == (None, probe.flops)
    assert (plan.flops.encoding > 0) == (autoencoder is not None)
    memory = plan.rows[0].memory
    assert (memory.weights, memory.gradients, memory.optimizer) == (probe.weights, probe.gradients, probe.optimizer)


def test_the_denoiser_of_genhancer_is_planned_without_its_memory(parts, tmp_path):
    """1.31 billion parameters that train, on pixels in place of FLUX's latents, whose config is not at hand."""
    settings = {"model__encoder": parts / "clip", "data__path": parts / "images", "denoiser__autoencoder": "null"}
    settings |= {"denoiser__image_size": 16, "training__per_device_train_batch_size": 1}
    recipe = load_recipe("genhancer-denoiser", tiny_overrides(parts, tmp_path, feedback=None, **settings))
    recipe.denoiser.config["in_channels"] = 12

    skeleton = build_skeleton(recipe)

    assert 1.3e9 < sum(p.numel() for p in skeleton.model.network.parameters()) < 1.32e9
    assert all(isinstance(p, FakeTensor) for p in skeleton.model.parameters())
