"""The same feedback whatever Trainer runs the model, and however it compiles, scales or wraps it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerState

from ..tiny import tiny_image, tiny_llava
from .helpers import GradientProbe, arguments, pixel_diffusion_model, relative_difference, samples
from .runs import UndrawnFeedback, by_hand, collate, logged, make_trainer, pictures_of, run, undrawn_callback

EXACT = 1e-5
CONDITIONER = "feedback_conditioner"


class CrampedTrainer(Trainer):
    """Runs out of memory with more than two samples in a batch, after the model's forward."""

    failing_micro_batch = 1

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.failing_micro_batch -= 1
        if len(inputs["input_ids"]) > 2 and self.failing_micro_batch < 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss


@pytest.mark.parametrize("failing", [1, 2])
def test_a_batch_size_is_found(tmp_path, failing):
    """The search ends at two samples a batch, whose gradient is that of a run which had two from the outset."""
    rows = samples(tiny_llava()[1], 8)
    settings = {"gradient_accumulation_steps": 2, "learning_rate": 0.0, "rows": rows}
    expected, steps = run(tmp_path, undrawn_callback(), per_device_train_batch_size=2, **settings)
    trainer, probe = make_trainer(
        tmp_path, undrawn_callback(), trainer_class=CrampedTrainer, auto_find_batch_size=True, **settings
    )
    trainer.failing_micro_batch = failing

    trainer.train()

    assert trainer.state.train_batch_size == 2
    assert relative_difference(steps[0], probe.steps[-1]) < EXACT
    assert relative_difference(steps[0], probe.steps[-1], CONDITIONER) < EXACT
    assert logged(trainer, "feedback_loss")[-1] == pytest.approx(logged(expected, "feedback_loss")[0], rel=1e-5)


class BatchesTrainer(Trainer):
    """Makes batches in a way of its own, which is no loader of torch."""

    def get_train_dataloader(self):
        return [collate(self.train_dataset[:2]), collate(self.train_dataset[2:])]


def test_a_loader_of_ones_own_trains(tmp_path):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    expected, (gradients,) = run(tmp_path, undrawn_callback(), **settings)

    trainer, (own,) = run(tmp_path, undrawn_callback(), trainer_class=BatchesTrainer, **settings)

    assert relative_difference(gradients, own) < EXACT
    assert relative_difference(gradients, own, CONDITIONER) < EXACT
    assert logged(trainer, "feedback_loss") == pytest.approx(logged(expected, "feedback_loss"), rel=1e-5)


class Stream(torch.utils.data.IterableDataset):
    """A data set without a length."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        yield from self.rows


def test_a_stream_of_samples_trains_alike(tmp_path):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    (expected,) = run(tmp_path, undrawn_callback(), **settings)[1]

    (gradients,) = run(tmp_path, undrawn_callback(), rows=Stream(samples(tiny_llava()[1])), **settings)[1]

    assert relative_difference(expected, gradients) < EXACT
    assert relative_difference(expected, gradients, CONDITIONER) < EXACT


@pytest.mark.slow
def test_a_compiled_model_has_the_same_feedback(tmp_path):
    expected, (gradients,) = run(tmp_path, undrawn_callback())

    trainer, (compiled,) = run(tmp_path, undrawn_callback(), torch_compile=True, torch_compile_backend="eager")

    compiled = {name.removeprefix("_orig_mod."): value for name, value in compiled.items()}
    assert relative_difference(gradients, compiled) < EXACT
    assert relative_difference(gradients, compiled, CONDITIONER) < EXACT
    assert logged(trainer, "feedback_loss") == pytest.approx(logged(expected, "feedback_loss"), rel=1e-5)


@pytest.mark.parametrize("scale", [2.0**8, 2.0**14])
def test_the_loss_scale_of_float16_scales_the_feedback_alike(tmp_path, scale):
    """As Accelerate does under `fp16`: the optimizer carries the scaler."""
    model, processor = tiny_llava()
    expected, _ = by_hand(samples(processor), conversations=4)
    callback = undrawn_callback()
    callback.attach(model, processor)
    model.train()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.scaler = scaler
    scaler.scale(torch.ones(1))  # makes its scale
    args = arguments(tmp_path)
    loader = torch.utils.data.DataLoader(samples(processor), batch_size=4)
    state = TrainerState()
    state.train_batch_size = 4

    callback.on_step_begin(args, state, None, optimizer=optimizer, train_dataloader=loader)
    with torch.autocast("cpu", torch.float16):
        loss = model(**collate(samples(processor))).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    callback.on_step_end(args, state, None)

    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert relative_difference(expected, gradients) < 0.01
    assert relative_difference(expected, gradients, CONDITIONER) < 0.01
    assert relative_difference(expected, gradients, "vision_tower") < 0.01


def test_a_tower_that_trains_in_full_beside_lora_has_the_same_feedback(tmp_path):
    """PEFT wraps what `modules_to_save` names; the tower's own gradient is that of the plain model."""
    model, _ = tiny_llava()
    config = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", modules_to_save=["vision_tower"])
    expected, (gradients,) = run(tmp_path, undrawn_callback())

    trainer, (wrapped,) = run(tmp_path, undrawn_callback(), model=get_peft_model(model, config))

    def named(given, part):
        return {name.split(part, 1)[1]: value for name, value in given.items() if part in name}

    tower = named(wrapped, "vision_tower.modules_to_save.default.")
    assert relative_difference(named(gradients, "vision_tower."), tower) < EXACT
    assert relative_difference(named(gradients, CONDITIONER), named(wrapped, CONDITIONER)) < EXACT
    assert logged(trainer, "feedback_loss") == pytest.approx(logged(expected, "feedback_loss"), rel=1e-5)


def test_lora_on_the_tower_has_the_feedback_of_the_cut_batch(tmp_path):
    def lora():
        torch.manual_seed(5)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return get_peft_model(tiny_llava()[0], config)

    (whole,) = run(tmp_path, undrawn_callback(), model=lora())[1]
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    (cut,) = run(tmp_path, undrawn_callback(), model=lora(), **settings)[1]

    assert any("vision_tower" in name and "lora" in name for name in whole)
    assert relative_difference(whole, cut) < EXACT
    assert relative_difference(whole, cut, CONDITIONER) < EXACT


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_the_feedback(tmp_path, reentrant):
    (expected,) = run(tmp_path, undrawn_callback())[1]

    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    trainer, (gradients,) = run(tmp_path, undrawn_callback(), **settings)

    assert relative_difference(expected, gradients) < EXACT
    assert relative_difference(expected, gradients, CONDITIONER) < EXACT
    assert len(logged(trainer, "feedback_loss")) == 1


# TRL


def _preferences(count=4):
    from datasets import Dataset

    def said(role, text):
        return {"role": role, "content": [{"type": "text", "text": text}]}

    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    return Dataset.from_list(
        [
            {
                "images": [tiny_image(index)],
                "prompt": asked,
                "chosen": [said("assistant", "a cat")],
                "rejected": [said("assistant", "a dog")],
            }
            for index in range(count)
        ]
    )


def _train_by_dpo(folder, callback, **settings):
    from trl import DPOConfig, DPOTrainer

    given = arguments(folder, **settings).to_dict()
    given = {k: v for k, v in given.items() if k in DPOConfig.__dataclass_fields__ and not k.startswith("_")}
    model, processor = tiny_llava()
    probe, calls = GradientProbe(), []

    def note(module, args, kwargs):
        calls.append(torch.is_grad_enabled())

    model.model.vision_tower.register_forward_pre_hook(note, with_kwargs=True)
    trainer = DPOTrainer(
        model=model,
        ref_model=tiny_llava()[0],
        args=DPOConfig(**given, max_length=None),
        train_dataset=_preferences(),
        processing_class=processor,
        callbacks=[probe, *([callback] if callback else [])],
    )
    calls.clear()
    trainer.train()
    return trainer, probe.steps[0], sum(calls)


@pytest.mark.slow
def test_dpo_has_the_feedback_of_the_cut_batch(tmp_path):
    """TRL shows each picture twice, beside what was chosen and what was rejected."""
    trainer, whole, calls = _train_by_dpo(tmp_path, undrawn_callback())
    accumulated, cut, more_calls = _train_by_dpo(
        tmp_path, undrawn_callback(), per_device_train_batch_size=1, gradient_accumulation_steps=4
    )

    assert more_calls > calls
    assert relative_difference(whole, cut) < EXACT
    assert relative_difference(whole, cut, CONDITIONER) < EXACT
    assert relative_difference(whole, cut, "vision_tower") < EXACT
    assert logged(accumulated, "feedback_loss") == pytest.approx(logged(trainer, "feedback_loss"), rel=1e-5)
    plain = _train_by_dpo(tmp_path, None)[1]
    assert relative_difference(plain, {name: whole[name] for name in plain}, "vision_tower") > 0.01


@pytest.mark.slow
def test_dpo_counts_each_picture_that_it_shows(tmp_path):
    """Oracle: eight pictures among four conversations."""
    trainer, gradients, _ = _train_by_dpo(tmp_path, undrawn_callback())

    model, processor = tiny_llava()
    callback = undrawn_callback()
    callback.attach(model, processor)
    images = [row["images"][0] for row in _preferences()]
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    tokens = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    feedback = UndrawnFeedback(pixel_diffusion_model().denoiser)
    errors = feedback(2 * pictures_of(processor, pixels) - 1, callback.conditioner(tokens))
    (callback.config.weight * 2 * errors.sum() / 4).backward()
    expected = {f"{CONDITIONER}.{name}": value.grad for name, value in callback.conditioner.named_parameters()}

    assert relative_difference(expected, {name: gradients[name] for name in expected}) < EXACT
    assert logged(trainer, "feedback_loss") == [pytest.approx(errors.mean().item(), rel=1e-5)]
