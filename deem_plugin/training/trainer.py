"""The Trainer of the recipes: stock, but for learning rates by part and for encoders that train without text."""

from transformers import Trainer

from deem_plugin.training.parts import find


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
        self._names = {}  # id of a parameter -> its name
        for name, parameter in self.model.named_parameters():
            self._names[id(parameter)] = name
        self._rates = {}  # name of a parameter -> learning rate
        for pattern, rate in self.learning_rates.items():
            self._rates.update(dict.fromkeys(find(self.model, pattern, "model.learning_rates"), rate))

    def create_optimizer(self, model=None):
        """Makes the stock optimizer and splits its groups by learning rate."""
        exists = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if exists or not self._rates:
            return optimizer
        # Sharding replaces the parameters and keeps their names.
        names = self._names | {id(value): name for name, value in (model or self.model).named_parameters()}
        groups = []
        for group in optimizer.param_groups:
            by_rate: dict[float, list] = {}
            for parameter in group["params"]:
                rate = self._rates.get(names[id(parameter)], group["lr"])
                by_rate.setdefault(rate, []).append(parameter)
            groups += [{**group, "params": parameters, "lr": rate} for rate, parameters in by_rate.items()]
        optimizer.param_groups[:] = groups
        return optimizer


class EncoderTrainer(RecipeTrainer):
    """A Trainer for an encoder alone, without text: what a feedback callback sends back is all there is."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Returns a loss of zero that depends on the tokens, so that the backward pass reaches them."""
        outputs = model(**inputs)
        loss = 0.0 * outputs.last_hidden_state.float().sum()
        return (loss, outputs) if return_outputs else loss
