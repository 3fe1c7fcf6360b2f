"""The weight that finds itself: what is measured at the tower's tokens, and what becomes of it."""

import math

import pytest
import torch

from deem_plugin.feedback import DiffusionFeedbackCallback
from deem_plugin.feedback.balance import Balance, GradientMeter
from deem_plugin.feedback.checkpoint import read_balance

from ..tiny import tiny_clip, tiny_image_processor, tiny_llava
from .helpers import collate, feedback_config, pixel_diffusion_model, relative_difference, samples
from .runs import UndrawnFeedback, by_hand, logged, make_trainer, pictures_of, run, undrawn_callback

NAMES = ("text_gradient_norm", "feedback_gradient_norm", "gradient_cosine")


def measured_by_hand(weight=50.0):
    """Oracle: both gradients at the tokens that the language model reads of four pictures, each taken alone."""
    model, processor = tiny_llava()
    callback = undrawn_callback()
    callback.attach(model, processor)
    callback.hook.state.scale = 0.0
    batch = collate(samples(processor))
    kept = []

    def keep(module, args, kwargs, output):
        kept.append(output.hidden_states[-2])
        output.hidden_states[-2].retain_grad()

    model.model.vision_tower.register_forward_hook(keep, with_kwargs=True)
    model(**batch).loss.backward()
    text = kept[0].grad.clone()
    tokens = kept[0].detach()[:, 1:].requires_grad_()
    pictures = 2 * pictures_of(processor, batch["pixel_values"]) - 1
    errors = UndrawnFeedback(pixel_diffusion_model().denoiser)(pictures, callback.conditioner(tokens))
    (feedback,) = torch.autograd.grad(weight * errors.sum() / 4, tokens)
    product = (text[:, 1:] * feedback).sum()
    return text.norm().item(), feedback.norm().item(), (product / text.norm() / feedback.norm()).item()


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (1, 4)])
def test_norms_and_cosine_are_those_of_both_gradients_alone(tmp_path, batch, accumulation):
    expected = measured_by_hand()

    trainer, _ = run(
        tmp_path, undrawn_callback(), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
    )

    assert [logged(trainer, name)[0] for name in NAMES] == pytest.approx(expected, rel=1e-4)


def test_measuring_changes_no_gradient(tmp_path):
    tokens = torch.randn(3, 4, 5, requires_grad=True)
    meter = GradientMeter(lambda **values: seen.update(values))
    seen = {}
    branch = meter.branch(tokens)
    text, feedback = torch.randn(2, 3, 4, 5)

    ((meter.own(branch) * text).sum() + (branch * feedback).sum()).backward()

    assert torch.equal(tokens.grad, text + feedback)
    assert seen["text"].sqrt() == pytest.approx(text.norm().item()) and seen["product"] == pytest.approx(
        (text * feedback).sum().item(), rel=1e-5
    )


def test_gradients_that_are_not_finite_are_not_measured():
    tokens = torch.ones(2, 3, requires_grad=True)
    seen = []
    meter = GradientMeter(lambda **values: seen.append(values))
    branch = meter.branch(tokens)

    ((meter.own(branch) * math.inf).sum() + branch.sum()).backward()

    assert [value.item() for value in seen[0].values()] == [0.0, 0.0, 0.0]


def weights_of(balance, unit, steps, text=2.0):
    """The weights of steps at which the feedback's gradient has a norm of `unit` for a weight of 1."""
    weights = []
    for _ in range(steps):
        balance.update(text**2, (unit * balance.weight) ** 2)
        weights.append(balance.weight)
    return weights


@pytest.mark.parametrize("unit", [0.02, 0.2, 2.0])
def test_the_weight_brings_the_norms_to_the_ratio(unit):
    weights = weights_of(Balance(0.5, start=5.0), unit, 400)

    assert weights[-1] == pytest.approx(0.5 * 2.0 / unit, rel=0.01)


def test_a_loud_feedback_is_hushed_at_once_and_a_silent_one_raised_slowly():
    loud, silent = weights_of(Balance(1.0, start=5.0), 40.0, 1), weights_of(Balance(1.0, start=5.0), 0.0, 100)

    assert loud[0] < 5.0 / 10
    assert silent == pytest.approx([5.0 * 0.97 ** (-step / 2) for step in range(1, 101)])


def test_the_weight_stays_within_a_hundred_times_its_start():
    assert weights_of(Balance(1.0, start=5.0), 1e9, 5)[-1] == 0.05
    assert weights_of(Balance(1.0, start=5.0), 0.0, 400)[-1] == 500.0


def test_steps_without_pictures_leave_the_weight():
    balance = Balance(1.0, start=5.0)
    balance.update(text=4.0, feedback=25.0)
    weight = balance.weight
    for _ in range(10):
        balance.update(text=0.0, feedback=0.0)

    assert balance.weight == pytest.approx(weight)


def test_a_step_has_the_weight_that_the_steps_before_give_it(tmp_path):
    """The first step starts at `weight`; the second has what a [`Balance`] makes of the norms of the first."""
    rows = samples(tiny_llava()[1])

    trainer, steps = run(tmp_path, undrawn_callback(balance=0.3), max_steps=2, learning_rate=0.0)

    text, feedback, _ = measured_by_hand()
    (expected,) = weights_of(Balance(0.3, start=50.0), feedback / 50, 1, text)
    assert logged(trainer, "feedback_weight")[0] == pytest.approx(expected, rel=1e-4)
    assert expected != pytest.approx(50, rel=0.01)
    for gradients, weight in zip(steps, (50.0, logged(trainer, "feedback_weight")[0]), strict=True):
        assert relative_difference(by_hand(rows, 4, weight)[0], gradients) < 1e-5


def test_the_cut_of_a_batch_does_not_change_the_weight(tmp_path):
    weights = []
    for batch, accumulation in ((4, 1), (1, 4)):
        trainer, _ = run(
            tmp_path / str(batch),
            undrawn_callback(balance=0.3),
            max_steps=3,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        weights.append(logged(trainer, "feedback_weight"))

    assert weights[1] == pytest.approx(weights[0], rel=1e-4)
    assert len(set(weights[0])) == 3


def test_a_share_measures_the_norm_of_all(tmp_path):
    """Over many steps: images that stand for others have a larger gradient each, and no part in the ratio."""
    settings = {"max_steps": 8, "learning_rate": 0.0, "logging_steps": 8}

    whole, shared = (run(tmp_path, undrawn_callback(share=share), **settings)[0] for share in (1.0, 0.25))

    expected = logged(whole, "feedback_gradient_norm")[0]
    assert logged(shared, "feedback_gradient_norm")[0] == pytest.approx(expected, rel=0.15)
    assert logged(shared, "text_gradient_norm") == pytest.approx(logged(whole, "text_gradient_norm"), rel=1e-5)


def test_a_resumed_run_goes_on_with_its_weight(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.0}
    whole, _ = run(tmp_path, undrawn_callback(balance=0.3), **settings)
    text, feedback = read_balance(tmp_path / "checkpoint-2")
    assert text > 0 and feedback > 0

    trainer, _ = make_trainer(tmp_path, callback := undrawn_callback(balance=0.3), **settings)
    trainer.train(str(tmp_path / "checkpoint-2"))

    assert logged(trainer, "feedback_weight") == logged(whole, "feedback_weight")
    assert read_balance(tmp_path) == (callback.hook.balance.text, callback.hook.balance.feedback)


def test_a_conditioner_of_a_run_without_balance_starts_it_anew(tmp_path):
    run(tmp_path, undrawn_callback())
    callback = undrawn_callback(balance=0.3)
    callback.attach(*tiny_llava())

    callback.start_from(tmp_path)

    assert callback.hook.balance.weight == 50.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"balance": 0.0}, "both must be above 0 and finite, got 0.0 and 50.0"),
        ({"balance": 0.5, "weight": 0.0}, "starts at `weight`"),
        ({"balance": 0.5, "conditioner_only": True}, "`conditioner_only: True` the feedback's passes them by"),
        ({"balance": 0.5, "condition": {"kind": "cls"}}, "`condition.kind: cls`"),
        ({"balance": 0.5, "condition": {"kind": "queries+dense"}}, "`condition.kind: queries.dense`"),
    ],
)
def test_what_cannot_be_balanced_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        feedback_config(**settings)


def test_an_encoder_alone_has_no_text_to_be_balanced_with():
    callback = DiffusionFeedbackCallback(feedback_config(balance=0.5), pixel_diffusion_model())

    with pytest.raises(ValueError, match="an encoder alone has none"):
        callback.attach(tiny_clip(), tiny_image_processor(), returns_loss=True)
