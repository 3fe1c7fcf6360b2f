"""What a recipe may choose beyond DEEM's own: condition, objective, draws, anchor and the two stages."""

import pytest
import torch

from deem_plugin.feedback import DiffusionFeedback, DiffusionFeedbackCallback
from deem_plugin.feedback.anchor import Anchor
from deem_plugin.feedback.checkpoint import load_conditioner
from deem_plugin.feedback.hook import TowerSource
from deem_plugin.feedback.prompts import prompt_states
from deem_plugin.feedback.state import StepState
from deem_plugin.vision.eyes import Eyes
from deem_plugin.vision.normalization import normalize, unnormalize

from ..tiny import tiny_llava, tiny_sd_folder, tiny_text_encoder
from .helpers import CONTEXT_DIM, collate, feedback_config, pixel_diffusion_model, relative_difference, samples, train


def callback_for(**settings):
    """A callback on the diffusion model of pixels, with the head of its conditioner drawn loud."""
    callback = DiffusionFeedbackCallback(feedback_config(**settings), pixel_diffusion_model())
    attach = callback.attach

    def loudly(model, processing_class=None, **options):
        attached = callback.hook is not None
        attach(model, processing_class, **options)
        if not attached and callback.config.condition.kind != "cls":
            torch.nn.init.normal_(callback.conditioner.head.weight, generator=torch.Generator().manual_seed(1))

    callback.attach = loudly
    return callback


@pytest.mark.parametrize(
    "settings",
    [
        {"condition": {"kind": "patches"}},
        {"condition": {"kind": "cls"}},
        {"condition": {"kind": "cls+patches", "num_patches": 3}},
        {"objective": {"draws_per_image": 3}},
        {"objective": {"loss_weighting": "min_snr"}},
        {"objective": {"kind": "contrastive"}},
        {"objective": {"kind": "contrastive", "num_negatives": 1}},
    ],
    ids=lambda settings: "-".join(str(value) for part in settings.values() for value in part.values()),
)
def test_the_tower_of_a_vlm_learns_under_every_choice(settings, tmp_path):
    callback = callback_for(**settings)

    trainer, (gradients,) = train(tmp_path, callback)

    lm_only = train(tmp_path)[1][0]
    assert relative_difference(lm_only, {name: gradients[name] for name in lm_only}, "vision_tower") > 1e-3
    assert any("feedback_loss" in entry for entry in trainer.state.log_history)


def test_draws_of_an_image_are_averaged_and_equal_one_draw_each():
    denoiser = pixel_diffusion_model().denoiser
    rng = torch.Generator().manual_seed(0)
    latents, context = torch.randn(2, 3, 32, 32, generator=rng), torch.randn(2, 4, CONTEXT_DIM, generator=rng)
    noise, timesteps = torch.randn(6, 3, 32, 32, generator=rng), torch.tensor([1, 300, 700, 20, 500, 999])

    together = DiffusionFeedback(denoiser, draws=3)(latents, context, noise=noise, timesteps=timesteps)

    single = DiffusionFeedback(denoiser)
    each = [single(latents, context, noise=noise[draw::3], timesteps=timesteps[draw::3]) for draw in range(3)]
    torch.testing.assert_close(together, torch.stack(each).mean(0))


def test_the_anchor_is_zero_at_first_and_pulls_back_a_tower_that_moved():
    model, processor = tiny_llava()
    tower, source = model.model.vision_tower, TowerSource(Eyes.of(model, processor))
    inputs = {"pixel_values": collate(samples(processor))["pixel_values"], "output_hidden_states": True}
    anchor = Anchor(tower)

    def distance():
        views = source.views((), inputs, tower(**inputs), StepState())
        return anchor.distance(views, (), inputs, source, StepState())

    assert distance().abs() < 1e-5
    optimizer = torch.optim.Adam(tower.parameters(), lr=1e-3)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    moved = distance()
    for _ in range(20):
        optimizer.zero_grad()
        distance().backward()
        optimizer.step()
    assert 0 < distance() < 0.7 * moved
    assert not any(parameter.requires_grad for parameter in anchor.tower.parameters())


def test_the_anchor_is_logged_and_no_part_of_the_model(tmp_path):
    callback = callback_for(anchor_weight=1.0)

    trainer, _ = train(tmp_path, callback, max_steps=2)

    logged = [entry["anchor_loss"] for entry in trainer.state.log_history if "anchor_loss" in entry]
    assert abs(logged[0]) < 1e-6 < logged[1]
    plain = train(tmp_path, callback_for())[0]
    assert trainer.model.state_dict().keys() == plain.model.state_dict().keys()


def test_stage_one_trains_the_conditioner_alone_and_stage_two_goes_on_with_it(tmp_path):
    callback = callback_for(conditioner_only=True, condition={"kind": "cls"})
    model, _ = tiny_llava()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lm_head" in name)  # something must depend on the tokens

    trainer, (gradients,) = train(tmp_path, callback, model=model)

    assert any("feedback_conditioner" in name for name in gradients)
    assert not any("vision_tower" in name for name in gradients)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if "lm_head" not in name)
    second = DiffusionFeedbackCallback(
        feedback_config(condition={"kind": "cls"}, conditioner=str(tmp_path)), pixel_diffusion_model()
    )
    second.attach(*tiny_llava())
    learned = load_conditioner(tmp_path)[0].state_dict()
    assert all(torch.equal(second.conditioner.state_dict()[name], value) for name, value in learned.items())


def test_a_prompt_is_asked_of_the_diffusion_models_own_encoder_once(tmp_path):
    folder = tiny_text_encoder(tiny_sd_folder(tmp_path / "sd"))
    condition = {"kind": "cls", "prompt": "a photo of a ."}
    config = feedback_config(diffusion_model={"path": str(folder)}, condition=condition)
    callback = DiffusionFeedbackCallback(config)

    callback.attach(*tiny_llava())

    states = callback.conditioner.prompt_states
    assert states.shape == (8, 16) and torch.equal(states, prompt_states(folder, "a photo of a .", 16))
    assert not torch.equal(states, prompt_states(folder, "", 16))
    with pytest.raises(ValueError, match="gives states of width 16, but the denoiser attends to width 20"):
        prompt_states(folder, "", 20)
    with pytest.raises(ValueError, match="has no CLIP `text_encoder`"):
        prompt_states(tiny_sd_folder(tmp_path / "without"), "", 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"condition": {"kind": "tokens"}},
            "`condition.kind` must be one of queries, queries\\+dense, patches, cls, cls\\+patches, got 'tokens'",
        ),
        (
            {"condition": {"num_patches": 4}},
            "`num_patches` belongs to `condition.kind: cls\\+patches`, and `condition.kind` is 'queries'",
        ),
        ({"objective": {"num_negatives": 4}}, "`num_negatives` belongs to `objective.kind: contrastive`"),
        ({"objective": {"kind": "contrastive", "draws_per_image": 2}}, "draws once an image"),
        ({"objective": {"draws_per_image": 0}}, "`draws_per_image` must be at least 1, got 0"),
        ({"anchor_weight": -1.0}, "`anchor_weight` must be a finite number, zero or positive, got -1.0"),
        ({"conditioner_only": True, "anchor_weight": 1.0}, "A frozen tower cannot drift"),
    ],
)
def test_settings_that_contradict_each_other_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        feedback_config(**settings)


def test_normalisation_and_its_inverse_come_from_the_same_statistics():
    """White is 1 and black 0, whatever the tower's mean and std (DIVA's code: 0.85 and -0.86)."""
    mean, std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
    for value in (0.0, 1.0):
        picture = torch.full((1, 3, 4, 4), value)
        torch.testing.assert_close(unnormalize(normalize(picture, mean, std), mean, std), picture)
