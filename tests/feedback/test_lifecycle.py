"""A feedback has a beginning and an end: nothing of a run, however it ended, is left for the next one."""

import copy
import io
import pickle

import pytest
import torch
from transformers import LlavaForConditionalGeneration, Trainer, TrainerCallback

from deem_plugin.feedback import DiffusionFeedbackCallback, load_conditioner, save_conditioner
from deem_plugin.feedback.checkpoint import FILE_NAME

from ..tiny import tiny_llava
from .helpers import feedback_config, pixel_diffusion_model, relative_difference, samples
from .runs import UndrawnFeedback, hooks_of, is_of_transformers, logged, make_trainer, run, undrawn_callback

EXACT = 1e-5
CONDITIONER = "feedback_conditioner"


def state_of(model):
    """What a callback may have changed of a model."""
    own = {name for name in vars(model) if "feedback" in name}
    return list(model.state_dict()), hooks_of(model), model._keys_to_ignore_on_save, own


# Attaching


@pytest.fixture
def other_conditioner(tmp_path):
    """The folder of a conditioner of other settings than the other tests'."""
    callback = undrawn_callback(condition={"num_queries": 5})
    callback.attach(*tiny_llava())
    (tmp_path / "other").mkdir()
    save_conditioner(callback.conditioner, callback.config, tmp_path / "other")
    return tmp_path / "other"


def test_an_attach_that_fails_changes_nothing_and_can_be_repeated(tmp_path, other_conditioner):
    model, processor = tiny_llava()
    before = state_of(model)
    callback = undrawn_callback(conditioner=str(other_conditioner))

    with pytest.raises(ValueError, match="num_queries.*5.*num_queries.*4"):
        callback.attach(model, processor)

    assert state_of(model) == before
    assert callback.hook is None and callback.conditioner is None and callback.model is None
    (other_conditioner / FILE_NAME).unlink()  # as the message advises
    callback.config.conditioner = None
    trainer, (gradients,) = run(tmp_path, callback, model=model)
    assert len(logged(trainer, "feedback_loss")) == 1
    assert any(CONDITIONER in name and value.any() for name, value in gradients.items())


def test_an_attach_without_a_processor_can_be_repeated_with_one():
    model, processor = tiny_llava()
    before = state_of(model)
    callback = undrawn_callback()

    with pytest.raises(ValueError, match="image_mean"):
        callback.attach(model, None)

    assert state_of(model) == before
    callback.attach(model, processor)
    assert callback.conditioner is not None and hooks_of(model)


def test_a_second_callback_on_a_model_is_refused(tmp_path):
    model, processor = tiny_llava()
    first, second = undrawn_callback(), undrawn_callback(condition={"num_queries": 3})
    first.attach(model, processor)
    before = state_of(model)

    with pytest.raises(ValueError, match=r"feedback of another DiffusionFeedbackCallback.*detach\(\)"):
        second.attach(model, processor)

    assert state_of(model) == before
    first.detach()
    second.attach(model, processor)
    assert second.conditioner.arguments["num_queries"] == 3


def test_two_callbacks_in_one_trainer_are_refused(tmp_path):
    with pytest.raises(ValueError, match="another DiffusionFeedbackCallback"):
        make_trainer(tmp_path, undrawn_callback(), callbacks=[undrawn_callback(condition={"num_queries": 3})])


def test_a_callback_for_a_second_model_is_refused(tmp_path):
    callback = undrawn_callback()
    run(tmp_path, callback)
    second, _ = tiny_llava(seed=1)
    before = state_of(second)

    with pytest.raises(ValueError, match="attached to another model.*make a new one"):
        make_trainer(tmp_path, callback, model=second)

    assert state_of(second) == before


def test_model_init_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match="model_init"):
        make_trainer(tmp_path, undrawn_callback(), model_init=lambda: tiny_llava()[0])[0].train()


# Detaching


@pytest.mark.parametrize("end", ["by hand", "after training"])
def test_a_detached_model_is_what_it_was(tmp_path, end):
    model, processor = tiny_llava()
    before = state_of(model)
    callback = undrawn_callback()

    callback.attach(model, processor)
    assert any(CONDITIONER in name for name in model.state_dict()) and hooks_of(model)
    if end == "by hand":
        callback.detach()
    else:
        run(tmp_path, callback, model=model)

    assert state_of(model) == before
    assert callback.conditioner is not None  # is kept, to be saved or looked at
    callback.detach()  # a second time does nothing
    assert state_of(model) == before


def test_keys_that_the_model_itself_ignores_stay(tmp_path):
    model, processor = tiny_llava()
    model._keys_to_ignore_on_save = {"lm_head.weight"}
    callback = undrawn_callback()

    callback.attach(model, processor)
    assert "lm_head.weight" in model._keys_to_ignore_on_save
    callback.detach()

    assert set(model._keys_to_ignore_on_save) == {"lm_head.weight"}


def test_a_trained_model_can_be_copied_and_pickled(tmp_path):
    model, processor = tiny_llava()
    run(tmp_path, undrawn_callback(), model=model)
    expected = model.state_dict()
    for module in model.modules():  # no LLaVA that has run can be pickled with these
        for key in [key for key, hook in module._forward_hooks.items() if is_of_transformers(hook)]:
            del module._forward_hooks[key]

    written = io.BytesIO()
    torch.save(model, written)
    written.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(written, weights_only=False)]

    for other in copies:
        assert not hooks_of(other)
        assert list(other.state_dict()) == list(expected)
        assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())


def test_a_second_training_of_the_trainer_goes_on(tmp_path):
    """`trainer.train()` twice: feedback in both, and the second one starts from the first one's conditioner."""
    callback = undrawn_callback()
    trainer, probe = make_trainer(tmp_path, callback)

    trainer.train()
    first = {name: value.clone() for name, value in callback.conditioner.state_dict().items()}
    trainer.train()

    assert len(probe.steps) == 2 and set(probe.steps[0]) == set(probe.steps[1])
    # The second trains what the first one left.
    head = callback.conditioner.state_dict()["head.weight"]
    assert 0 < (head - first["head.weight"]).abs().max() < 2e-3  # one step of the learning rate 1e-3
    assert not hooks_of(trainer.model)


def test_a_second_training_has_the_gradient_of_the_first(tmp_path):
    trainer, probe = make_trainer(tmp_path, undrawn_callback(), learning_rate=0.0)

    trainer.train()
    trainer.train()

    assert relative_difference(*probe.steps) < EXACT


def test_a_second_trainer_with_a_new_callback_has_the_gradient_of_the_first(tmp_path):
    model, _ = tiny_llava()

    (first,) = run(tmp_path, undrawn_callback(), model=model, learning_rate=0.0)[1]
    (second,) = run(tmp_path, undrawn_callback(), model=model, learning_rate=0.0)[1]

    assert relative_difference(first, second) < EXACT


def test_a_second_trainer_gets_its_targets(tmp_path):
    """A second stage on the same model restores the targets of its own batches."""
    model, processor = tiny_llava()
    rows = [{**row, "target_pixel_values": torch.full((3, 32, 32), 0.5)} for row in samples(processor)]
    rows = [{**row, "target_pixel_values": row["target_pixel_values"] + 0.01 * row["pixel_values"]} for row in rows]

    (first,) = run(tmp_path, undrawn_callback(), model=model, rows=rows, learning_rate=0.0)[1]
    (second,) = run(tmp_path, undrawn_callback(), model=model, rows=rows, learning_rate=0.0)[1]
    (plain,) = run(tmp_path, undrawn_callback(), model=model, learning_rate=0.0)[1]

    assert relative_difference(first, second) < EXACT
    assert relative_difference(first, plain, CONDITIONER) > 0.01


# Interrupted runs

ERRORS = {
    "Ctrl-C": KeyboardInterrupt(),
    "out of memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "an error": ValueError("of the loss"),
}


class InterruptedTrainer(Trainer):
    """Fails once, after the model's forward and before its backward pass, in the given micro-batch."""

    error, failing = None, 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.failing -= 1
        if self.failing == 0:
            raise self.error
        return loss


def interrupted(folder, callback, error, failing=2, **settings):
    """Trains until the given micro-batch fails, and returns the Trainer and its probe."""
    trainer, probe = make_trainer(folder, callback, trainer_class=InterruptedTrainer, **settings)
    trainer.error, trainer.failing = error, failing
    with pytest.raises(type(error)):
        trainer.train()
    trainer.model.zero_grad()
    return trainer, probe


STILL = {"learning_rate": 0.0, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_an_interrupted_trainer_trains_again(tmp_path, error):
    (expected,) = run(tmp_path, undrawn_callback(), **STILL)[1]
    trainer, probe = interrupted(tmp_path, undrawn_callback(), error, **STILL)

    trainer.train()

    (gradients,) = probe.steps
    assert relative_difference(expected, gradients) < EXACT
    assert relative_difference(expected, gradients, CONDITIONER) < EXACT
    assert not hooks_of(trainer.model)


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_the_cell_that_was_interrupted_can_be_run_again(tmp_path, error):
    """A notebook makes a new Trainer and a new callback for the same model: nothing is doubled."""
    expected, losses = run(tmp_path, undrawn_callback(), **STILL)
    model, _ = tiny_llava()
    old = undrawn_callback()
    interrupted(tmp_path, old, error, model=model, **STILL)

    trainer, (gradients,) = run(tmp_path, undrawn_callback(), model=model, **STILL)

    assert relative_difference(losses[0], gradients) < EXACT
    assert relative_difference(losses[0], gradients, CONDITIONER) < EXACT
    assert logged(trainer, "feedback_loss") == pytest.approx(logged(expected, "feedback_loss"))
    assert not hooks_of(model) and not old.hook.state.pending


def test_an_interrupted_model_without_a_new_callback_is_clean_after_detach(tmp_path):
    model, _ = tiny_llava()
    before = state_of(model)
    callback = undrawn_callback()
    interrupted(tmp_path, callback, KeyboardInterrupt(), model=model, **STILL)

    callback.detach()

    assert state_of(model) == before
    plain = run(tmp_path, model=model, **STILL)[1][0]
    assert not any("feedback" in name for name in plain)


def test_an_interrupted_run_resumes_in_the_same_trainer(tmp_path):
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    whole, _ = run(tmp_path / "whole", undrawn_callback(), **settings)
    callback = undrawn_callback()
    trainer, _ = interrupted(tmp_path / "cut", callback, KeyboardInterrupt(), failing=2, **settings)
    assert (tmp_path / "cut/checkpoint-1" / FILE_NAME).is_file()

    trainer.train(resume_from_checkpoint=True)

    expected = load_conditioner(tmp_path / "whole")[0].state_dict()
    for name, value in load_conditioner(tmp_path / "cut")[0].state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5, msg=name)
    losses = logged(whole, "feedback_loss")
    assert logged(trainer, "feedback_loss") == pytest.approx(losses, rel=1e-5) and len(losses) == 3


def test_a_run_that_is_interrupted_twice_resumes_from_its_checkpoint_each_time(tmp_path):
    """Both times after a step that the checkpoint does not hold. The conditioner alone trains."""
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def settings():
        model = tiny_llava()[0].requires_grad_(False)
        return {"model": model, "callback": undrawn_callback(conditioner_only=True), **steps}

    run(tmp_path / "whole", **settings())
    trainer, _ = interrupted(tmp_path / "cut", error=KeyboardInterrupt(), failing=4, **settings())
    trainer.failing = 2
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=True)

    trainer.train(resume_from_checkpoint=True)

    expected = load_conditioner(tmp_path / "whole")[0].state_dict()
    for name, value in load_conditioner(tmp_path / "cut")[0].state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("end", ["interrupted", "ended"])
def test_an_older_trainer_cannot_train_beside_a_newer_one(tmp_path, end):
    """Else two hooks would give their feedback."""
    model, _ = tiny_llava()
    if end == "interrupted":
        older, _ = interrupted(tmp_path, undrawn_callback(), KeyboardInterrupt(), model=model, **STILL)
    else:
        older, _ = run(tmp_path, undrawn_callback(), model=model, **STILL)
    make_trainer(tmp_path, undrawn_callback(), model=model, **STILL)

    with pytest.raises(ValueError, match="another DiffusionFeedbackCallback"):
        older.train()


# Batches


class NotedFeedback(UndrawnFeedback):
    """Notes what must be restored."""

    def __init__(self, denoiser):
        super().__init__(denoiser)
        self.means = []

    def __call__(self, latents, context, **options):
        self.means.append(latents.mean().item())
        return super().__call__(latents, context, **options)


def test_the_targets_of_one_batch_never_serve_another(tmp_path):
    """Evaluation has targets, training has none: it restores its own pictures."""
    _, processor = tiny_llava()
    rows = samples(processor)
    generator = torch.Generator().manual_seed(3)
    targets = [{**row, "target_pixel_values": 0.7 + 0.1 * torch.rand(3, 32, 32, generator=generator)} for row in rows]
    settings = {"max_steps": 3, "learning_rate": 0.0}
    callback, plain = undrawn_callback(NotedFeedback), undrawn_callback(NotedFeedback)

    run(tmp_path, plain, **settings)
    run(tmp_path, callback, eval_dataset=targets, eval_strategy="steps", eval_steps=1, **settings)

    assert callback.objective.means == pytest.approx(plain.objective.means) and len(plain.objective.means) == 3
    assert max(plain.objective.means) < 0.1


# What a run leaves behind


@pytest.mark.parametrize("better", ["greater", "smaller"])
def test_the_best_conditioner_is_kept_beside_the_best_model(tmp_path, better):
    _, processor = tiny_llava()

    trainer, _ = run(
        tmp_path,
        undrawn_callback(),
        max_steps=3,
        eval_dataset=samples(processor),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=better == "greater",
    )

    saved = [load_conditioner(tmp_path / f"checkpoint-{step}")[0].state_dict() for step in (1, 2, 3)]
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / ("checkpoint-1" if better == "greater" else "checkpoint-3"))
    kept = load_conditioner(tmp_path)[0].state_dict()
    same = [all(torch.equal(value, kept[name]) for name, value in weights.items()) for weights in saved]
    assert same == [better == "greater", False, better == "smaller"]


def test_the_anchor_of_a_resumed_run_is_the_tower_of_its_beginning(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    whole, _ = run(tmp_path, undrawn_callback(anchor_weight=1.0), **settings)
    expected = logged(whole, "anchor_loss")
    assert expected[0] == pytest.approx(0.0, abs=1e-6) and min(expected[1:]) > 1e-3

    # From the checkpoint's own weights, as a user builds a LLaVA to be resumed.
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-2")
    resumed, _ = make_trainer(tmp_path, undrawn_callback(anchor_weight=1.0), model=model, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

    assert logged(resumed, "anchor_loss") == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("better", ["greater", "smaller"])
def test_the_best_model_itself_is_loaded(tmp_path, better):
    """Also where transformers stores the weights under other names than they have in memory, as LLaVA's."""
    model, processor = tiny_llava()

    trainer, _ = run(
        tmp_path,
        undrawn_callback(),
        model=model,
        max_steps=2,
        eval_dataset=samples(processor),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=better == "greater",
    )

    best = LlavaForConditionalGeneration.from_pretrained(trainer.state.best_model_checkpoint).state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, best[name], atol=0, rtol=0, msg=name)


# Trackers


class LiveReader(TrainerCallback):
    """Reads a run's curves while it is written, as a TensorBoard that is open does."""

    def __init__(self):
        self.events = None

    def on_step_end(self, args, state, control, **kwargs):
        from pathlib import Path

        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        runs = list(Path(args.output_dir).glob("runs/*"))
        if runs:
            self.events = self.events or EventAccumulator(str(runs[0]))
            self.events.Reload()


def test_a_run_writes_one_file_of_events_and_its_curves_go_on(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = LiveReader()
    trainer, _ = run(tmp_path, undrawn_callback(), callbacks=[reader], max_steps=6, report_to="tensorboard")

    (folder,) = (tmp_path / "runs").iterdir()
    assert len(list(folder.glob("events*"))) == 1
    files = list(folder.rglob("events*"))
    assert len(files) == 2
    reader.events.Reload()
    assert len(reader.events.Scalars("train/loss")) == 6
    (own,) = [path for path in files if path.parent != folder]
    written = [event.value for event in EventAccumulator(str(own.parent)).Reload().Scalars("train/feedback_loss")]
    assert written == pytest.approx(logged(trainer, "feedback_loss")) and len(written) == 6


def test_a_tracker_is_made_and_set_up_once_a_run(tmp_path, monkeypatch):
    from transformers.integrations import TensorBoardCallback

    made, set_up = [], []
    make, init = TensorBoardCallback.__init__, TensorBoardCallback._init_summary_writer
    monkeypatch.setattr(
        TensorBoardCallback, "__init__", lambda self, *a, **k: (made.append(self), make(self, *a, **k))[1]
    )
    monkeypatch.setattr(
        TensorBoardCallback,
        "_init_summary_writer",
        lambda self, *a, **k: (set_up.append(self), init(self, *a, **k))[1],
    )

    run(tmp_path, undrawn_callback(), max_steps=5, report_to="tensorboard")

    # That of the Trainer, and that for the feedback's values.
    assert len(made) == 2 and len(set_up) == 2


def test_no_tracker_is_made_where_none_is_asked_for(tmp_path):
    run(tmp_path, undrawn_callback(), max_steps=2, report_to="none")

    assert not list(tmp_path.rglob("events*"))


# Evaluation


def evaluated(folder, eval_dataset, **settings):
    """Trains with in_eval and a feedback that draws its noise."""
    callback = DiffusionFeedbackCallback(feedback_config(in_eval=True), pixel_diffusion_model())
    steps = {"eval_strategy": "steps", "eval_steps": 1, **settings}
    return run(folder, callback, eval_dataset=eval_dataset, **steps)[0]


def test_each_evaluation_set_has_a_feedback_loss_of_its_own(tmp_path):
    _, processor = tiny_llava()
    rows = samples(processor, 8)
    alone = [evaluated(tmp_path, part) for part in (rows[:4], rows[4:])]
    expected = [logged(trainer, "eval_feedback_loss")[0] for trainer in alone]
    assert expected[0] != pytest.approx(expected[1], rel=1e-4)

    trainer = evaluated(tmp_path, {"a": rows[:4], "b": rows[4:]})

    assert logged(trainer, "eval_a_feedback_loss") == [pytest.approx(expected[0], rel=1e-5)]
    assert logged(trainer, "eval_b_feedback_loss") == [pytest.approx(expected[1], rel=1e-5)]
    assert not logged(trainer, "eval_feedback_loss")


def test_an_evaluation_by_hand_under_another_name_is_logged_and_leaves_nothing(tmp_path):
    _, processor = tiny_llava()
    rows = samples(processor, 8)
    callback = DiffusionFeedbackCallback(feedback_config(in_eval=True), pixel_diffusion_model())
    trainer, _ = make_trainer(tmp_path, callback, prediction_loss_only=True)

    trainer.evaluate(rows[:4])
    trainer.evaluate(rows[4:], metric_key_prefix="test")
    trainer.predict(rows[4:])
    trainer.evaluate(rows[:4])

    assert len(logged(trainer, "test_feedback_loss")) == 1
    first, second = logged(trainer, "eval_feedback_loss")
    assert first == second


def test_the_same_weights_have_the_same_feedback_loss_at_each_evaluation(tmp_path):
    _, processor = tiny_llava()

    trainer = evaluated(tmp_path, samples(processor), max_steps=4, learning_rate=0.0)

    losses = logged(trainer, "eval_feedback_loss")
    assert len(losses) == 4 and losses == [losses[0]] * 4


def test_evaluation_computes_no_feedback_unless_asked(tmp_path):
    _, processor = tiny_llava()
    callback = undrawn_callback(NotedFeedback)
    trainer, _ = make_trainer(tmp_path, callback, eval_dataset=samples(processor))

    trainer.evaluate()

    assert not callback.objective.means and not logged(trainer, "eval_feedback_loss")


def test_evaluation_leaves_the_training_as_it_is(tmp_path):
    """The noise, the weights and the log of the training are those of a run without evaluation."""
    _, processor = tiny_llava()

    def trained(**settings):
        callback = DiffusionFeedbackCallback(feedback_config(in_eval=True), pixel_diffusion_model())
        return run(tmp_path, callback, max_steps=3, **settings)

    plain, expected = trained()
    trainer, steps = trained(eval_dataset=samples(processor), eval_strategy="steps", eval_steps=1)

    assert logged(trainer, "feedback_loss") == pytest.approx(logged(plain, "feedback_loss"), rel=1e-6)
    assert all(relative_difference(*pair) < EXACT for pair in zip(expected, steps, strict=True))


def test_generation_is_no_evaluation():
    model, processor = tiny_llava()
    callback = undrawn_callback(NotedFeedback, in_eval=True)
    callback.attach(model, processor)
    model.eval()
    row = samples(processor, 1)[0]
    prompt = {name: row[name][None] for name in ("input_ids", "attention_mask", "pixel_values")}

    with torch.no_grad():
        model.generate(**prompt, max_new_tokens=3, do_sample=False)

    assert not callback.objective.means


# Noise


class NoiseSpy(UndrawnFeedback):
    """Notes the first number that each call would draw."""

    def __init__(self, denoiser):
        super().__init__(denoiser)
        self.drawn = []

    def __call__(self, latents, context, *, generator=None, **options):
        self.drawn.append(torch.randn(3, generator=generator).tolist())
        return super().__call__(latents, context, **options)


def test_noise_is_a_function_of_seed_and_step(tmp_path):
    def drawn(folder, resume=None, **settings):
        callback = undrawn_callback(NoiseSpy, **settings)
        steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.0}
        trainer, _ = make_trainer(
            folder, callback, per_device_train_batch_size=2, gradient_accumulation_steps=2, **steps
        )
        trainer.train(resume_from_checkpoint=resume)
        return callback.objective.drawn

    whole = drawn(tmp_path / "a")
    assert len({tuple(numbers) for numbers in whole}) == 8  # four steps of two micro-batches, each its own
    assert drawn(tmp_path / "b") == whole
    assert not any(numbers in whole for numbers in drawn(tmp_path / "c", seed=1))
    assert drawn(tmp_path / "a", resume=str(tmp_path / "a/checkpoint-2")) == whole[4:]
