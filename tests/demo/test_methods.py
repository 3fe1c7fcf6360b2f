"""The demo's comparison of feedback methods: each arm has the feedback of its method and no other."""

from dataclasses import replace

import pytest
import torch

from deem_plugin.demo.arms import ALL_ARMS, ARMS, METHOD_ARMS
from deem_plugin.demo.diffusion_model import shipped_diffusion_model
from deem_plugin.demo.methods import METHODS, method_overrides
from deem_plugin.demo.methods_report import METHODS_ARMS
from deem_plugin.demo.models import IMAGE_SIZE, build_vlm
from deem_plugin.demo.run import main
from deem_plugin.feedback import DiffusionFeedbackCallback
from deem_plugin.feedback.contrastive import ContrastiveFeedback
from deem_plugin.feedback.diffusion_feedback import DiffusionFeedback
from deem_plugin.feedback.from_scratch import make_diffusion_model, save_diffusion_model
from deem_plugin.feedback.latents import PixelCodec
from deem_plugin.feedback.ross import RossLoss
from deem_plugin.feedback.state import StepState
from deem_plugin.training.recipes import load_recipe, read_sections


@pytest.fixture(scope="module")
def tiny_denoiser(tmp_path_factory):
    """The untrained diffusion model of the GenHancer arm."""
    folder = tmp_path_factory.mktemp("diffusion_model")
    section = read_sections("tiny-denoiser")["denoiser"]
    save_diffusion_model(make_diffusion_model(section["network"], section["config"], PixelCodec(), 16), folder)
    return folder


def feedback_of(name, folder):
    """The callback of an arm on the demo's model, after one training step, and the context that it made."""
    overrides = [*method_overrides(name, folder), "training.use_cpu=true"]
    callback = DiffusionFeedbackCallback(load_recipe("tiny-align", overrides).feedback)
    model, processor = build_vlm(0)
    callback.attach(model.train(), processor)
    seen = {}
    scorer = callback.hook.loss.objective

    def recording(latents, context, **extra):
        seen.update(latents=latents, context=context, **extra)
        seen["loss"] = scorer(latents, context, **extra)
        return seen["loss"]

    recording.denoiser = scorer.denoiser
    if hasattr(scorer, "second_views"):
        recording.second_views = scorer.second_views
    callback.hook.loss.objective, callback.hook.state = recording, StepState(1.0)
    image = torch.full((4, 8), model.config.image_token_id)
    words = torch.full((4, 3), processor.tokenizer.convert_tokens_to_ids("red"))
    ids = torch.cat([image, words], dim=1)
    pictures = torch.rand(4, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    pixels = callback.hook.source.eyes.normalize(pictures)
    model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).loss.backward()
    callback.hook.check_injected()
    assert torch.isfinite(seen["loss"]).all() and seen["loss"].min() > 0
    gradients = [p.grad for p in model.model.vision_tower.parameters() if p.grad is not None]
    assert any(gradient.any() for gradient in gradients)
    return callback, scorer, seen


def test_every_method_is_an_arm_beside_no_feedback():
    assert METHOD_ARMS.keys() == METHODS.keys() == {"deem", "diva", "dcr", "genhancer", "ross"}
    assert list(METHODS_ARMS) == ["no-feedback", *METHODS] and not METHODS_ARMS["no-feedback"].feedback
    assert len({arm.title for arm in ALL_ARMS.values()}) == len(ALL_ARMS) and not ARMS.keys() & METHODS.keys()


@pytest.mark.parametrize("name", METHODS)
def test_what_a_recipe_says_of_its_method_is_what_the_arm_has(name):
    chosen = load_recipe("tiny-align", [*method_overrides(name, "x"), "training.use_cpu=true"]).feedback
    overrides = ["training.use_cpu=true", "training.bf16=null", "training.tf32=null", "training.fsdp=null"]
    published = load_recipe(METHODS[name].recipe, overrides).feedback

    assert type(chosen) is type(published)
    assert replace(chosen.objective, num_negatives=None) == published.objective
    if name != "ross":
        assert chosen.condition.kind == published.condition.kind
        assert chosen.anchor_weight == published.anchor_weight


def test_deem_reads_the_queries_and_anchors_the_tower():
    callback, scorer, seen = feedback_of("deem", shipped_diffusion_model())

    assert type(scorer) is DiffusionFeedback and scorer.draws == 1
    assert callback.hook.anchor is not None and seen["context"].shape == (4, 8, 64)


def test_diva_reads_the_pooled_vector_and_some_of_the_queries_twice():
    callback, scorer, seen = feedback_of("diva", shipped_diffusion_model())

    assert scorer.draws == 2 and callback.hook.anchor is None
    assert callback.config.condition.num_patches == 7 and seen["context"].shape == (4, 8, 64)


def test_dcr_sets_a_view_and_three_other_pictures_against_the_picture():
    _, scorer, seen = feedback_of("dcr", shipped_diffusion_model())

    assert type(scorer) is ContrastiveFeedback and scorer.num_negatives == 3
    assert seen["context"].shape == seen["second_view"][0].shape == (4, 1, 64)
    assert not torch.equal(seen["context"], seen["second_view"][0])


def test_genhancer_modulates_a_diffusion_model_of_its_own_by_the_pooled_vector(tiny_denoiser):
    callback, _, seen = feedback_of("genhancer", tiny_denoiser)

    assert type(callback.diffusion_model.denoiser.model).__name__ == "SD3Transformer2DModel"
    assert seen["context"].shape == (4, 1, 64) and seen["vector"].shape == (4, 64)


def test_ross_asks_the_language_model_at_the_places_of_the_picture():
    callback, scorer, seen = feedback_of("ross", shipped_diffusion_model())

    assert isinstance(callback.hook.loss, RossLoss) and scorer.draws == 4
    assert seen["context"].shape == (4, 8, 64) and seen["latents"].shape == (4, 3, 16, 32)


@pytest.mark.slow
def test_the_short_form_compares_all_methods(tmp_path):
    assert main(tmp_path, methods=True, fast=True) == 0

    report = (tmp_path / "methods.md").read_text()
    assert "Short form" in report and report.count("zero-shot") == 1
    for arm in METHODS_ARMS.values():
        assert report.count(f"| {arm.title} |") == (2 if arm.title == "no feedback" else 3)
