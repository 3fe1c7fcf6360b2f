"""A share of the pictures of a step stands for all: without bias, drawn alike on every rank and after a resume."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState

from deem_plugin.feedback.loss import FeedbackLoss
from deem_plugin.feedback.state import StepState
from deem_plugin.vision.views import sample_images

from ..tiny import tiny_llava
from .helpers import collate, feedback_config, relative_difference, samples, train, views_of
from .runs import by_hand, logged, mixed, run, undrawn_callback


class SeenByCodec:
    """Counts the pictures that each call encodes, in place of a codec's `posterior`."""

    def __init__(self, callback):
        self.calls, self.ask = [], callback.diffusion_model.codec.posterior
        callback.diffusion_model.codec.posterior = self

    def __call__(self, pictures):
        self.calls.append(pictures.clone())
        return self.ask(pictures)

    @property
    def counts(self):
        return [len(pictures) for pictures in self.calls]


def step_of(callback, step, rank=0, **settings):
    """The state that a Trainer's events make of a step."""
    defaults = {"gradient_accumulation_steps": 1, "train_batch_size": 4, "process_index": rank, "world_size": 1}
    args = SimpleNamespace(**{**defaults, **settings})
    callback.on_step_begin(args, TrainerState(global_step=step), TrainerControl())
    return callback.hook.state


@pytest.fixture(scope="module")
def attached():
    callback = undrawn_callback(share=0.5)
    callback.attach(*tiny_llava())
    return callback


def gradient_of(loss, callback, views, tokens):
    """The gradient of the loss of views at the tokens of all pictures."""
    tokens.grad = None
    loss(views, callback.conditioner, torch.Generator()).total.backward()
    return tokens.grad.clone()


@pytest.mark.parametrize(("count", "share"), [(4, 0.25), (4, 0.5), (3, 0.5), (3, 0.25)])
def test_the_mean_over_all_draws_is_the_gradient_of_all(attached, count, share):
    """Every offset by which the number is rounded, and all sets of as many pictures."""
    tokens = torch.randn(count, 4, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = FeedbackLoss(attached.diffusion_model, attached.objective, feedback_config().condition)
    pictures = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def views():
        return views_of(tokens.unbind(), pictures)

    expected = gradient_of(loss, attached, views(), tokens)
    means = []
    for offset in (torch.arange(4) / 4 + 0.125).tolist():
        drawn = {}
        for seed in range(200):
            chosen = sample_images(views(), share, 0, offset, seed)
            drawn[tuple(view.image for view in chosen)] = chosen
        size = len(next(iter(drawn)))
        assert len(drawn) == len(list(torch.combinations(torch.arange(count), size))) if size else drawn == {(): []}
        gradients = [gradient_of(loss, attached, chosen, tokens) for chosen in drawn.values() if chosen]
        means.append(torch.stack(gradients or [torch.zeros_like(expected)]).mean(0))

    torch.testing.assert_close(torch.stack(means).mean(0), expected, atol=1e-6, rtol=1e-5)


def test_the_mean_of_400_draws_is_within_three_standard_errors(attached):
    """Six pictures in calls of four and two, with the seeds of a Trainer's steps."""
    tokens = torch.randn(6, 4, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = FeedbackLoss(attached.diffusion_model, attached.objective, feedback_config().condition)
    pictures = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    views = views_of(tokens.unbind(), pictures)
    expected = gradient_of(loss, attached, views, tokens)
    # A picture's gradient does not depend on the others of its batch, so that one pass serves all draws.
    sums = torch.zeros(400, 6)
    for step in range(400):
        state = step_of(attached, step)
        for part in (views[:4], views[4:]):
            for view in state.draw(part, 0.25):
                sums[step, view.image] += view.weight
            state.generator("cpu")

    estimates = sums[:, :, None, None] * expected
    error = (estimates.mean(0) - expected).norm()
    standard_error = (estimates.var(0).sum() / 400).sqrt()

    assert error < 3 * standard_error < 0.5 * expected.norm()


def test_draws_are_as_even_as_whole_numbers_can_be():
    views = [views_of(torch.zeros(1, 1, 2))[0] for _ in range(8)]
    for offset, share in product((0.0, 0.3, 0.999999999999), (0.1, 0.25, 0.7, 1 - 1e-16)):
        state, total = StepState(offset=offset), 0
        for call, view in enumerate(views, start=1):
            total += len(state.draw([view], share))
            assert abs(total - share * call) < 1


def test_every_rank_restores_as_many_and_its_own():
    callback = undrawn_callback(share=0.25)
    callback.attach(*tiny_llava())
    views = views_of(torch.zeros(6, 1, 2))

    drawn = [
        [[view.image for view in step_of(callback, step, rank).draw(views, 0.25)] for rank in range(4)]
        for step in range(50)
    ]

    assert all(len({len(images) for images in ranks}) == 1 for ranks in drawn)
    assert any(len({tuple(images) for images in ranks}) > 1 for ranks in drawn)
    assert {len(ranks[0]) for ranks in drawn} == {1, 2}


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_what_is_not_drawn_is_neither_encoded_nor_restored(tmp_path, batch, accumulation):
    callback = undrawn_callback(share=0.25)
    seen = SeenByCodec(callback)

    trainer, steps = run(
        tmp_path,
        callback,
        max_steps=3,
        learning_rate=0.0,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )

    assert seen.counts == [1, 1, 1]
    assert all(step["feedback_conditioner.head.weight"].any() for step in steps)


def test_a_picture_that_is_drawn_counts_for_those_that_are_not(tmp_path):
    """Two of four: the gradient is that of twice their losses, and the log is their mean."""
    _, processor = tiny_llava()
    rows = samples(processor)
    callback = undrawn_callback(share=0.5)
    seen = SeenByCodec(callback)
    trainer, (gradients,) = run(tmp_path, callback)
    (drawn,) = seen.calls
    own = [2 * _picture(row, processor) - 1 for row in rows]
    counts = [2.0 * any(torch.allclose(picture, one, atol=1e-5) for one in drawn) for picture in own]
    assert sorted(counts) == [0, 0, 2, 2]

    expected, errors = by_hand(rows, conversations=4, counts=counts)

    assert relative_difference(expected, gradients, "vision_tower") < 1e-5
    assert relative_difference(expected, gradients, "feedback_conditioner") < 1e-5
    mean = sum(count * error for count, error in zip(counts, errors.tolist(), strict=True)) / 4
    assert logged(trainer, "feedback_loss") == [pytest.approx(mean, rel=1e-5)]


def _picture(row, processor):
    image_processor = processor.image_processor
    mean, std = (torch.tensor(getattr(image_processor, f"image_{name}")) for name in ("mean", "std"))
    return row["pixel_values"] * std.view(3, 1, 1) + mean.view(3, 1, 1)


def test_a_call_that_draws_none_leaves_the_conditioner_a_gradient_of_zero(tmp_path):
    """Other ranks may have drawn some, and wait for it."""
    callback = undrawn_callback(share=0.25)
    callback.attach(*tiny_llava())
    callback.hook.state = StepState(1.0)  # rounds down
    model, processor = callback.model, tiny_llava()[1]

    model(**collate(samples(processor, 2))).loss.backward()
    callback.hook.check_injected()

    gradients = [parameter.grad for parameter in callback.conditioner.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
    assert callback.hook.sums.totals.get("images") is None


def test_text_among_pictures_does_not_count(tmp_path):
    _, processor = tiny_llava()
    callback = undrawn_callback(share=0.25)
    seen = SeenByCodec(callback)

    run(tmp_path, callback, rows=mixed(processor), per_device_train_batch_size=1, gradient_accumulation_steps=8)

    assert seen.counts == [1]


def test_a_resumed_run_draws_alike(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.0}

    def drawn(resume=None):
        callback = undrawn_callback(share=0.25)
        seen = SeenByCodec(callback)
        _, processor = tiny_llava()
        from .runs import make_trainer

        make_trainer(tmp_path, callback, rows=samples(processor, 16), **settings)[0].train(resume)
        return torch.cat(seen.calls)

    whole, rest = drawn(), drawn(str(tmp_path / "checkpoint-2"))

    assert len(whole) == 4 and torch.equal(whole[2:], rest)


def test_a_cached_run_looks_up_what_it_draws(tmp_path):
    from .test_latent_cache import callback as cached
    from .test_latent_cache import fill, load_diffusion_model, tiny_sd_folder

    sd = tiny_sd_folder(tmp_path / "sd")
    _, processor = tiny_llava()
    rows = samples(processor)
    for row in rows:
        fill(tmp_path / "cache", load_diffusion_model(str(sd)), _picture(row, processor)[None])
    settings = {"max_steps": 2, "rows": rows}

    plain, cached = (
        train(tmp_path, _shared(cached(sd, **options)), **settings)[0]
        for options in ({}, {"latent_cache": str(tmp_path / "cache"), "gradient_checkpointing": True})
    )

    assert logged(plain, "feedback_loss") == pytest.approx(logged(cached, "feedback_loss"), rel=1e-5)


def _shared(callback):
    callback.config.share = 0.25
    return callback


def test_an_evaluation_restores_all(tmp_path):
    callback = undrawn_callback(share=0.25, in_eval=True)
    seen = SeenByCodec(callback)
    _, processor = tiny_llava()

    run(tmp_path, callback, eval_dataset=samples(processor), eval_strategy="steps", per_device_eval_batch_size=4)

    assert seen.counts == [1, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0.0}, "`share` must be above 0 and at most 1"),
        ({"share": 1.5}, "got 1.5"),
        ({"share": 0.5, "objective": {"kind": "contrastive"}}, "compares the images of a micro-batch"),
        ({"share": 0.5, "condition": {"kind": "queries+dense"}}, "'share'"),
    ],
)
def test_what_cannot_be_shared_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        feedback_config(**settings)
