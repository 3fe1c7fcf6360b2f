import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import LlavaForConditionalGeneration, Trainer

from deem_plugin.feedback import DiffusionFeedbackCallback
from deem_plugin.feedback.checkpoint import FILE_NAME

from ..tiny import tiny_llava
from .helpers import (
    GradientProbe,
    KeyedFeedback,
    arguments,
    collate,
    feedback_config,
    keyed_callback,
    pixel_diffusion_model,
    relative_difference,
    samples,
    total_loss,
    train,
    views_of,
)

EXACT = 1e-5


def test_the_gradient_is_that_of_the_sum_of_both_losses(tmp_path):
    """Oracle: lm_loss + weight * feedback by hand, with the tower's tokens as LLaVA reads them."""
    callback = keyed_callback()
    _, (gradients,) = train(tmp_path, callback)

    model, processor = tiny_llava()
    reference = keyed_callback()
    reference.attach(model, processor)
    batch = collate(samples(processor))
    tower = model.model.vision_tower
    tokens = tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    lm_loss = model(**batch).loss
    mean, std = torch.tensor(reference.hook.source.eyes.mean), torch.tensor(reference.hook.source.eyes.std)
    pictures = batch["pixel_values"] * std.view(3, 1, 1) + mean.view(3, 1, 1)
    loss = lm_loss + callback.config.weight * total_loss(reference, views_of(tokens, pictures)) / 4
    loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    assert relative_difference(expected, gradients) < EXACT
    assert relative_difference(expected, gradients, "vision_tower") < EXACT
    lm_only = train(tmp_path)[1][0]
    assert relative_difference(lm_only, {n: gradients[n] for n in lm_only}, "vision_tower") > 0.01


@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "label_smoothing_factor": 0.0},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=["accumulate 4 of 1", "accumulate 2 of 2", "checkpointing", "reentrant checkpointing"],
)
def test_gradients_do_not_depend_on_how_the_batch_is_run(tmp_path, settings):
    expected = train(tmp_path, keyed_callback())[1][0]

    gradients = train(tmp_path, keyed_callback(), **settings)[1][0]

    assert relative_difference(expected, gradients) < EXACT
    assert relative_difference(expected, gradients, "vision_tower") < EXACT


def test_mixed_precision_keeps_the_feedback(tmp_path):
    expected = train(tmp_path, keyed_callback())[1][0]

    whole = train(tmp_path, keyed_callback(), bf16=True)[1][0]
    accumulated = train(
        tmp_path, keyed_callback(), bf16=True, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )[1][0]

    assert relative_difference(expected, whole, "vision_tower") < 0.05
    assert relative_difference(whole, accumulated, "vision_tower") < 0.05


def test_the_last_shorter_accumulation_of_an_epoch_is_weighted_right(tmp_path):
    """Six samples in accumulations of four: the second step holds two micro-batches."""
    _, processor = tiny_llava()
    rows = samples(processor, 6)
    settings = {"max_steps": 2, "learning_rate": 0.0, "rows": rows}
    by_one = train(
        tmp_path, keyed_callback(), per_device_train_batch_size=1, gradient_accumulation_steps=4, **settings
    )[1]
    by_four = train(tmp_path, keyed_callback(), **settings)[1]

    for expected, gradients in zip(by_four, by_one, strict=True):
        assert relative_difference(expected, gradients, "vision_tower") < EXACT
        assert relative_difference(expected, gradients, "feedback_conditioner") < EXACT


def test_label_smoothing_keeps_the_feedback(tmp_path):
    settings = {"label_smoothing_factor": 0.1}
    expected = train(tmp_path, keyed_callback(), **settings)[1][0]
    plain = train(tmp_path, **settings)[1][0]
    accumulated = train(
        tmp_path, keyed_callback(), per_device_train_batch_size=1, gradient_accumulation_steps=4, **settings
    )[1][0]

    assert relative_difference(expected, accumulated, "vision_tower") < EXACT
    assert relative_difference(plain, {n: expected[n] for n in plain}, "vision_tower") > 0.01


def _with_lora():
    model, _ = tiny_llava()
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(5)
    return get_peft_model(model, config)


def test_lora_on_tower_and_language_model_accumulates_alike(tmp_path):
    expected = train(tmp_path, keyed_callback(), model=_with_lora())[1][0]

    gradients = train(
        tmp_path,
        keyed_callback(),
        model=_with_lora(),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )[1][0]

    assert any("vision_tower" in name and "lora" in name for name in gradients)
    assert any("feedback_conditioner" in name for name in gradients)
    assert relative_difference(expected, gradients) < EXACT


def test_sft_trainer_gets_the_same_feedback(tmp_path):
    from trl import SFTConfig, SFTTrainer

    def run(callback, **settings):
        model, processor = tiny_llava()
        probe = GradientProbe()
        args = arguments(tmp_path, **settings).to_dict()
        config = SFTConfig(
            **{k: v for k, v in args.items() if k in SFTConfig.__dataclass_fields__ and not k.startswith("_")},
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
        )
        SFTTrainer(
            model=model,
            args=config,
            train_dataset=_as_dataset(samples(processor)),
            data_collator=_collate_lists,
            processing_class=processor,
            callbacks=[probe, *([callback] if callback else [])],
        ).train()
        return probe.steps[0]

    expected = train(tmp_path, keyed_callback())[1][0]
    whole = run(keyed_callback())
    accumulated = run(keyed_callback(), per_device_train_batch_size=1, gradient_accumulation_steps=4)

    assert relative_difference(whole, accumulated) < EXACT
    assert relative_difference(expected, whole, "feedback_conditioner") < EXACT
    assert relative_difference(expected, whole, "vision_tower") < 1e-4


def _as_dataset(rows):
    from datasets import Dataset

    return Dataset.from_list([{name: value.tolist() for name, value in row.items()} for row in rows])


def _collate_lists(rows):
    return collate([{name: torch.tensor(value) for name, value in row.items()} for row in rows])


def test_weight_zero_is_exactly_no_callback(tmp_path):
    settings = {"max_steps": 3, "max_grad_norm": 1.0}
    plain, _ = train(tmp_path, **settings)
    with_zero, _ = train(tmp_path, keyed_callback(weight=0.0), **settings)

    weights = with_zero.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in plain.model.state_dict().items())
    assert plain.state.log_history[0]["loss"] == with_zero.state.log_history[0]["loss"]


def test_the_denoiser_stays_as_it_was_and_out_of_everything(tmp_path):
    callback = keyed_callback()
    before = {n: v.clone() for n, v in callback.diffusion_model.denoiser.model.state_dict().items()}

    trainer, _ = train(tmp_path, callback, max_steps=2, save_strategy="steps", save_steps=2)

    denoiser = callback.diffusion_model.denoiser.model
    assert all(torch.equal(value, before[name]) for name, value in denoiser.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in denoiser.parameters()) and not denoiser.training
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in denoiser.parameters()}
    assert {id(p) for p in callback.conditioner.parameters()} <= trained
    checkpoint = tmp_path / "checkpoint-2"
    plain, _ = tiny_llava()
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        saved = set(file.keys())
    plain.save_pretrained(tmp_path / "plain")
    with safe_open(tmp_path / "plain/model.safetensors", framework="pt") as file:
        assert saved == set(file.keys())
    assert (checkpoint / FILE_NAME).is_file() and (tmp_path / FILE_NAME).is_file()


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def callback():
        diffusion_model = pixel_diffusion_model()
        return DiffusionFeedbackCallback(feedback_config(), diffusion_model)  # fresh noise at each step

    whole, _ = train(tmp_path / "whole", callback(), **settings)

    _, processor = tiny_llava()
    checkpoint = tmp_path / "whole/checkpoint-2"
    # Trainer looks for the names in memory, the file has those of the original release; from_pretrained knows both.
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint)
    resumed = Trainer(
        model=model,
        args=arguments(tmp_path / "whole", **settings),
        train_dataset=samples(processor),
        data_collator=collate,
        processing_class=processor,
        callbacks=[callback()],
    )
    resumed.train(resume_from_checkpoint=str(checkpoint))

    expected = whole.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5, msg=name)


def test_resuming_without_the_conditioner_says_what_to_do(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    train(tmp_path, **settings)  # a run without feedback
    model, processor = tiny_llava()
    callback = keyed_callback()
    with pytest.raises((FileNotFoundError, ValueError), match="callback.load|optimizer"):
        Trainer(
            model=model,
            args=arguments(tmp_path, **settings),
            train_dataset=samples(processor),
            data_collator=collate,
            processing_class=processor,
            callbacks=[callback],
        ).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_feedback_loss_is_logged_and_reaches_tensorboard(tmp_path):
    trainer, _ = train(tmp_path, keyed_callback(), max_steps=2, report_to="tensorboard")

    losses = [row["feedback_loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2 and all(loss > 0 for loss in losses)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(run / "feedback")).Reload()
    written = [event.value for event in events.Scalars("train/feedback_loss")]
    assert written == pytest.approx(losses)
    # The Trainer's own file is alone in its folder, so that readers which take the newest one stay with it.
    assert len(list(run.glob("events*"))) == 1 and len(list((run / "feedback").glob("events*"))) == 1


def test_evaluation_computes_no_feedback_unless_asked(tmp_path):
    _, processor = tiny_llava()
    losses = []
    for asked in (False, True):
        trainer, _ = train(
            tmp_path, keyed_callback(in_eval=asked), eval_dataset=samples(processor), eval_strategy="steps"
        )
        (logged,) = (row for row in trainer.state.log_history if "eval_loss" in row)
        assert ("eval_feedback_loss" in logged) is asked
        losses.append(logged["eval_loss"])
    assert losses[0] == losses[1]


def test_batches_without_pictures_cost_nothing(tmp_path):
    _, processor = tiny_llava()
    callback = keyed_callback()

    trainer, (gradients,) = train(tmp_path, callback, rows=samples(processor, with_images=False))

    assert not any("vision_tower" in name or "feedback" in name for name in gradients)
    assert "feedback_loss" not in trainer.state.log_history[0]


def test_target_pixel_values_of_a_batch_are_the_target(tmp_path):
    """The pixels the diffusion model must restore, given as a target, change nothing; other pixels do."""
    _, processor = tiny_llava()
    rows = samples(processor)
    mean = torch.tensor(processor.image_processor.image_mean).view(3, 1, 1)
    std = torch.tensor(processor.image_processor.image_std).view(3, 1, 1)
    same = [{**row, "target_pixel_values": (row["pixel_values"] * std + mean).clamp(0, 1) * 2 - 1} for row in rows]
    other = [{**row, "target_pixel_values": -row["target_pixel_values"]} for row in same]

    expected = train(tmp_path, keyed_callback())[1][0]

    assert relative_difference(expected, train(tmp_path, keyed_callback(), rows=same)[1][0]) < 1e-3
    assert relative_difference(expected, train(tmp_path, keyed_callback(), rows=other)[1][0]) > 0.01


def test_a_frozen_tower_is_refused():
    model, processor = tiny_llava()
    model.model.vision_tower.requires_grad_(False)

    with pytest.raises(ValueError, match="CLIPVisionModel.*is frozen.*Unfreeze"):
        keyed_callback().attach(model, processor)


def test_a_conditioner_in_no_optimizer_group_is_refused(tmp_path):
    model, processor = tiny_llava()
    optimizer = torch.optim.AdamW(model.parameters())  # built before the callback could attach

    trainer = Trainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=samples(processor),
        data_collator=collate,
        processing_class=processor,
        optimizers=(optimizer, None),
        callbacks=[keyed_callback()],
    )

    with pytest.raises(ValueError, match="no optimizer group.*callback.attach"):
        trainer.train()


def test_a_context_of_the_wrong_width_is_refused():
    diffusion_model = pixel_diffusion_model(context_dim=8)
    feedback = KeyedFeedback(diffusion_model.denoiser)

    with pytest.raises(ValueError, match=r"width 16.*width 8.*context_dim=8"):
        feedback(torch.zeros(1, 3, 32, 32), torch.zeros(1, 4, 16))


def test_a_callback_added_too_late_is_refused(tmp_path):
    model, processor = tiny_llava()
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=samples(processor),
        data_collator=collate,
        processing_class=processor,
    )
    trainer.add_callback(keyed_callback())

    with pytest.raises(RuntimeError, match="attached to nothing.*callbacks="):
        trainer.train()


def test_several_gpus_in_one_process_are_refused(tmp_path):
    model, processor = tiny_llava()
    callback = keyed_callback()
    callback.attach(model, processor)
    args = arguments(tmp_path)
    args._n_gpu = 2  # what a process that sees two GPUs finds

    with pytest.raises(ValueError, match="nn.DataParallel on 2 GPUs.*torchrun --nproc_per_node 2"):
        callback.on_train_begin(args, None, None)


def test_an_unknown_normalisation_is_refused():
    model, _ = tiny_llava()

    with pytest.raises(ValueError, match="image_mean.*processing_class=processor"):
        keyed_callback().attach(model, None)


def test_feedback_that_never_reaches_the_tower_is_an_error(tmp_path):
    """The eyes are told a layer that the model does not read."""
    model, processor = tiny_llava()
    callback = keyed_callback()
    callback.attach(model, processor)
    # LLaVA reads hidden_states[-2], not the last hidden state.
    callback.hook.source.eyes.reading.paths = [("last_hidden_state",)]

    with pytest.raises(RuntimeError, match="never reached the vision tower"):
        train(tmp_path, callback, model=model)
