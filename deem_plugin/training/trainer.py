"""The Trainer of the recipes: stock, but for learning rates by part and for encoders that train without text."""

import torch
from transformers import PreTrainedModel

from deem_plugin.data.collator import ConversationCollator
from deem_plugin.feedback.callback import DiffusionFeedbackCallback
from deem_plugin.feedback.checkpoint import load_by_class
from deem_plugin.feedback.finite import FiniteTally
from deem_plugin.feedback.state import Sums
from deem_plugin.training.data import ExamplesTrainer
from deem_plugin.training.parts import find, matches, resolve
from deem_plugin.training.sharding import PictureInEachBatch, name_sharded_layers, uses_fsdp
from deem_plugin.training.training_arguments import naming_training

# What the interleaved model returns beside its loss, as shares of an optimizer step's mean; logged by these names.
NAMED_LOSSES = ("lm_loss", "image_loss")
FEEDBACK_SUMS = ("loss", "images", "views", "nonfinite", "blank")


class RecipeTrainer(ExamplesTrainer):
    """
    A Trainer of [`Examples`] whose model's parts may have learning rates of their own.

    Args:
        learning_rates (`dict[str, float]`, *optional*): Pattern to peak learning rate; the schedule scales all alike.
            What no pattern names trains with `args.learning_rate`; of two patterns that name the same, the later wins.
    """

    def __init__(self, model, args, data_collator=None, *, learning_rates: dict[str, float] | None = None, **kwargs):
        if uses_fsdp(args):
            name_sharded_layers(model, args)
            if isinstance(data_collator, ConversationCollator):
                data_collator = PictureInEachBatch(data_collator)
        super().__init__(model, args, data_collator, **kwargs)
        self.learning_rates = {resolve(self.model, pattern): rate for pattern, rate in (learning_rates or {}).items()}
        self._sums, self._tally = Sums(), FiniteTally()
        self._summed_since = 0
        for pattern in self.learning_rates:
            find(self.model, pattern, "model.learning_rates")

    def create_optimizer(self, model=None):
        """Makes the stock optimizer and splits its groups by learning rate."""
        exists = self.optimizer is not None
        with naming_training():
            optimizer = super().create_optimizer(model)
        if exists or not self.learning_rates:
            return optimizer
        rates = {}  # id of a parameter -> learning rate
        for name, parameter in (self.model if model is None else model).named_parameters():
            for pattern, rate in self.learning_rates.items():
                if matches(pattern, name):
                    rates[id(parameter)] = rate
        groups = []
        for group in optimizer.param_groups:
            by_rate: dict[float, list] = {}
            for parameter in group["params"]:
                by_rate.setdefault(rates.get(id(parameter), group["lr"]), []).append(parameter)
            groups += [{**group, "params": parameters, "lr": rate} for rate, parameters in by_rate.items()]
        optimizer.param_groups[:] = groups
        return optimizer

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """
        Also counts documents and images of the whole optimizer step, as the stock method counts the tokens. No batches
        where a finished run is resumed: the stock loop asks only after a step whether it was the last.
        """
        if self.state.global_step >= self.state.max_steps:
            return [], None
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._names_losses and batches and num_items is not None:
            count = self.accelerator.unwrap_model(self.model).totals_of
            total = torch.stack([count(batch) for batch in batches]).sum(0).to(device)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                total = self.accelerator.gather(total).view(-1, len(total)).sum(0)
            for batch in batches:
                batch["step_totals"] = total
        return batches, num_items

    @property
    def _names_losses(self):
        return hasattr(self.accelerator.unwrap_model(self.model), "totals_of")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As the stock method, and adds up the losses that the model names."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training and isinstance(outputs, dict):
            if not self._sums.totals:
                self._summed_since = self.state.global_step
            self._sums.add(**{name: outputs[name] for name in NAMED_LOSSES if outputs.get(name) is not None})
            if (losses := outputs.get("feedback")) is not None:
                self._sums.add(**losses.sums())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        """
        Adds the named losses: their mean over the steps since the last log; and the feedback as the callback does: its
        mean per image over these steps, and what was left out. All over all ranks.
        """
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, DiffusionFeedbackCallback):
                callback.add_to(logs, self.args)  # before the trackers are told
        steps = self.state.global_step - self._summed_since
        # Each rank and micro-batch has its share of a step's mean, so the sum over them is the mean. What is summed up
        # does not depend on the rank's own batches: all of them must ask.
        if "loss" in logs and steps and self._names_losses:
            sums = self._sums.take((*NAMED_LOSSES, *FEEDBACK_SUMS), self.args.device)
            logs |= {name: sums[name] / steps for name in NAMED_LOSSES if sums[name]}
            if sums["images"]:
                logs["feedback_loss"] = sums["loss"] / sums["images"]
            logs |= {f"feedback_{name}": sums[name] for name in ("blank", "nonfinite") if sums[name]}
            self._tally.add(sums["views"], sums["nonfinite"])
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial):
        """As the stock method, which would delete older checkpoints before this one is complete."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit

    def _load_optimizer_and_scheduler(self, checkpoint):
        """As the stock method; names the checkpoint in a `ValueError` where it trained other parameters."""
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            raise ValueError(f"The run of {checkpoint} cannot go on, it trained other parameters: {error}.") from error

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Loads a checkpoint's weights by [`load_by_class`]."""
        target = self.model if model is None else model
        if not isinstance(target, PreTrainedModel) or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_by_class(target, resume_from_checkpoint)


class EncoderTrainer(RecipeTrainer):
    """A Trainer for an encoder alone, without text, whose loss is the feedback in the output."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Returns the feedback; a zero with a graph in a step without."""
        outputs = model(**inputs)
        loss = outputs.get("feedback_loss")
        if loss is None:
            loss = outputs.last_hidden_state[:0].float().sum()
        return (loss, outputs) if return_outputs else loss
