"""The Trainer of the recipes: stock, but for learning rates by part and for encoders that train without text."""

from transformers import PreTrainedModel, Trainer

from deem_plugin.training.parts import find, matches


class RecipeTrainer(Trainer):
    """
    A `transformers.Trainer` whose parts may have learning rates of their own.

    Args:
        learning_rates (`dict[str, float]`, *optional*):
            Pattern to peak learning rate; the schedule scales all alike. What no pattern names trains with
            `args.learning_rate`; of two patterns that name the same, the later wins.
    """

    def __init__(self, *args, learning_rates: dict[str, float] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.learning_rates = learning_rates or {}
        for pattern in self.learning_rates:
            find(self.model, pattern, "model.learning_rates")

    def create_optimizer(self, model=None):
        """Makes the stock optimizer and splits its groups by learning rate."""
        exists = self.optimizer is not None
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

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """
        Loads a checkpoint's weights by the model's own `from_pretrained`.

        The stock method loads them by name and only warns about names that do not match. LLaVA and its kin are stored
        under other names than they have in memory, so that none would match, and the run would go on with the weights
        that it once started from (seen with transformers 5.23).
        """
        target = self.model if model is None else model
        if not isinstance(target, PreTrainedModel) or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        stored = type(target).from_pretrained(resume_from_checkpoint, dtype=target.dtype).state_dict()
        missing, unexpected = target.load_state_dict(stored, strict=False)
        # What is not saved with the model (the feedback's conditioner) restores itself.
        missing = sorted(set(missing) - set(target._keys_to_ignore_on_save or ()))
        if missing or unexpected:
            raise ValueError(
                f"The checkpoint {resume_from_checkpoint} is not of this run's model: missing {missing[:3]}, "
                f"unexpected {unexpected[:3]}. Resume with the recipe and the settings that it was written with."
            )


class EncoderTrainer(RecipeTrainer):
    """A Trainer for an encoder alone, without text: what a feedback callback sends back is all there is."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Returns a loss of zero that depends on the tokens, so that the backward pass reaches them."""
        outputs = model(**inputs)
        loss = 0.0 * outputs.last_hidden_state.float().sum()
        return (loss, outputs) if return_outputs else loss
