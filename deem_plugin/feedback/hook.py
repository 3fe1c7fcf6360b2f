"""A forward hook on a vision tower that computes the diffusion feedback and sends its gradient back."""

import torch

from .injection import Injection
from .objectives import unnormalize
from .views import call_arguments, image_views


class RunningMean:
    """A mean that stays on the device until it is asked for, so that logging costs no synchronisation a step."""

    def __init__(self):
        self.total = None
        self.count = 0

    def add(self, value):
        """Adds a scalar tensor."""
        value = value.detach().double()
        self.total = value if self.total is None else self.total + value
        self.count += 1

    def take(self, device):
        """Returns the mean over all ranks since the last call, as a float, and starts anew; None without a value."""
        total = torch.zeros((), dtype=torch.float64, device=device) if self.total is None else self.total.to(device)
        sums = torch.stack([total, torch.tensor(self.count, dtype=torch.float64, device=device)])
        self.total, self.count = None, 0
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        total, count = sums.tolist()
        return total / count if count else None


class FeedbackHook:
    """
    Computes the feedback inside the tower's own forward, where autocast, checkpointing and sharding are already right.

    The tower runs once and serves the language model and the denoiser alike. The gradient of the feedback enters the
    backward pass at the tokens that the language model reads (see [`Injection`]).

    Args:
        conditioner (`Callable`): Returns the [`Conditioner`]; asked at each call, since wrappers may replace it.
        feedback (`Callable`): `(latents, context, *, generator) -> (batch,)`, a [`DiffusionFeedback`].
        generator (`Generator`): Encodes pictures to latents.
        reading (`TokenReading`): Which of the tower's outputs the VLM reads.
        mean, std (`Sequence[float]`): Normalisation of `pixel_values`.
        in_eval (`bool`): Whether the feedback is also computed (not sent back) in evaluation.
    """

    def __init__(self, conditioner, feedback, generator, reading, mean, std, in_eval=False):
        self.conditioner = conditioner
        self.feedback = feedback
        self.generator = generator
        self.reading = reading
        self.mean, self.std = mean, std
        self.in_eval = in_eval
        # What the training loop sets before each step.
        self.scale = 0.0
        self.seed = 0
        # `target_pixel_values` of the batch, put here before the model runs and taken by the next call of the tower.
        self.target_pixel_values = None
        self.train_loss, self.eval_loss = RunningMean(), RunningMean()
        self.pending: list[Injection] = []

    def per_image_loss(self, views):
        """Returns the feedback of each image of `views`, `(images,)`, with fresh noise."""
        tokens, mask = views.padded_tokens()
        rng = torch.Generator(device=tokens.device).manual_seed(self.seed)
        self.seed += 1  # another micro-batch, other noise
        with torch.no_grad():
            latents = self.generator.to(tokens.device).encode(self._pictures(views), generator=rng)
        return self.feedback(latents, self.conditioner()(tokens, mask), generator=rng)

    def _pictures(self, views):
        """Returns what the generator must restore, `(images, 3, height, width)` in [0, 1]."""
        if self.target_pixel_values is not None:
            targets, self.target_pixel_values = self.target_pixel_values, None
            if len(targets) != len(views.tokens):
                raise ValueError(
                    f"The batch holds {len(targets)} `target_pixel_values` for {len(views.tokens)} pictures; "
                    f"expected one target a picture, in [-1, 1]."
                )
            return targets.to(views.tokens[0].device).float().clamp(-1, 1) / 2 + 0.5
        if len({picture.shape for picture in views.pictures}) == 1:
            return unnormalize(torch.stack(views.pictures), self.mean, self.std)
        return torch.cat(
            [self.generator.resize(unnormalize(picture[None], self.mean, self.std)) for picture in views.pictures]
        )

    @torch.compiler.disable
    def __call__(self, tower, args, kwargs, output):
        """Is called by torch after the tower's forward; returns the output with wrapped tokens."""
        training = torch.is_grad_enabled()
        if training and self.scale == 0.0:
            return output
        # TRL also runs training batches without gradients, for its metrics: they are no evaluation.
        if not training and (tower.training or not self.in_eval):
            return output

        views = image_views(call_arguments(tower, args, kwargs), output, self.reading)
        loss = self.per_image_loss(views).mean()
        if not training:
            self.eval_loss.add(loss)
            return output
        self.train_loss.add(loss)
        injection = Injection(loss, self.scale)
        self.pending.append(injection)
        # The VLM reads one of these; whichever its backward pass reaches first carries the gradient.
        if output.hidden_states is not None:
            layers = {layer % len(output.hidden_states) for layer in self.reading.layers}
            output["hidden_states"] = tuple(
                injection.through(state) if index in layers else state
                for index, state in enumerate(output.hidden_states)
            )
        output["last_hidden_state"] = injection.through(output.last_hidden_state)
        return output

    def check_injected(self):
        """Raises a `RuntimeError` if feedback was computed whose gradient never entered a backward pass."""
        lost = sum(not injection.fired for injection in self.pending)
        count = len(self.pending)
        self.pending.clear()
        if lost:
            raise RuntimeError(
                f"The gradient of {lost} of {count} feedback losses never reached the vision tower: the loss did not "
                f"depend on the tokens that `vision_feature_layer` names ({self.reading.layers or 'the last layer'}). "
                f"Set the model's `vision_feature_layer` to the layer that it really reads."
            )
