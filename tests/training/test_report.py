import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from deem_plugin.training.report import MovementCheck
from deem_plugin.training.trainer import RecipeTrainer

from ..tiny import tiny_llava


class Small(nn.Module):
    """A tower and a head; a batch without pictures never calls the tower."""

    def __init__(self, under_no_grad=False):
        super().__init__()
        self.tower, self.head = nn.Linear(2, 2), nn.Linear(2, 1)
        self.under_no_grad = under_no_grad

    def forward(self, x, has_picture):
        if has_picture.all():
            with torch.set_grad_enabled(not self.under_no_grad):
                x = self.tower(x)
        return {"loss": self.head(x).mean()}


def run(model, tmp_path, pictures=(1, 1, 1), callbacks=(), **settings):
    """Trains `model` for three steps on batches with and without pictures; returns the check."""
    data = [{"x": torch.ones(2) * (index + 1), "has_picture": flag} for index, flag in enumerate(pictures)]
    settings = {"max_steps": 3, "learning_rate": 0.1, "train_sampling_strategy": "sequential", **settings}
    args = TrainingArguments(
        tmp_path, per_device_train_batch_size=1, save_strategy="no", use_cpu=True, disable_tqdm=True, **settings
    )
    check = MovementCheck(model.tower)
    Trainer(model, args, train_dataset=data, callbacks=[*callbacks, check]).train()
    return check


def test_a_run_that_trains_its_tower_passes(tmp_path):
    run(Small(), tmp_path)


def test_a_tower_without_gradient_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="meant to train, but did not move .*learning rate 0.1.*no_grad"):
        run(Small(under_no_grad=True), tmp_path)


def test_a_frozen_tower_may_stay_where_it_is(tmp_path):
    model = Small()
    model.tower.requires_grad_(False)
    run(model, tmp_path)


def test_steps_without_pictures_or_learning_rate_are_not_checked(tmp_path):
    model = Small(under_no_grad=True)
    run(model, tmp_path, pictures=(0, 0, 0))
    with pytest.raises(RuntimeError, match="did not move"):
        run(model, tmp_path, pictures=(0, 1, 1))
    # The first step of a warm-up has learning rate 0: the tower cannot move yet.
    run(Small(), tmp_path, warmup_steps=2)


def test_a_frozen_parameter_that_changes_is_an_error(tmp_path):
    model = Small()
    model.head.requires_grad_(False)

    class Meddler(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            model.head.bias.data += 1

    with pytest.raises(
        RuntimeError, match="1 frozen parameters changed in the first optimizer step, first 'head.bias'"
    ):
        run(model, tmp_path, callbacks=[Meddler()])


def test_learning_rates_go_to_the_parts_that_they_name_and_decay_stays_as_it_is(tmp_path):
    model, _ = tiny_llava()
    args = TrainingArguments(tmp_path, learning_rate=1.0, weight_decay=0.5, use_cpu=True)
    rates = {"vision_tower": 0.1, "vision_tower.encoder.layers.0": 0.01}

    trainer = RecipeTrainer(model, args, learning_rates=rates)
    optimizer = trainer.create_optimizer()

    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    decays = set(trainer.get_decay_parameter_names(model))
    assert len(found) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        rate = 1.0 if "vision_tower" not in name else 0.01 if "encoder.layers.0." in name else 0.1
        assert found[id(parameter)] == (rate, 0.5 if name in decays else 0.0), name
    trainer.create_scheduler(num_training_steps=10)
    assert {group["initial_lr"] for group in optimizer.param_groups} == {1.0, 0.1, 0.01}
