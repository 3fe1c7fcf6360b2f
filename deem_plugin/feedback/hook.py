"""A forward hook on a vision tower that computes the diffusion feedback and sends its gradient back."""

from contextlib import nullcontext

import torch

from .conditions import condition_tokens, dense_maps
from .denoisers import Denoiser
from .early_gradient import early_gradient
from .injection import Injection
from .objectives import normalize, unnormalize
from .second_view import augment, augment_as_published
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
        generator (`DiffusionModel`): Encodes pictures to latents.
        reading (`TokenReading`): Which of the tower's outputs the VLM reads.
        mean, std (`Sequence[float]`): Normalisation of `pixel_values`.
        config (`FeedbackConfig`): Which tokens the generator is shown, and whether evaluation shows them too.
        anchor (`Anchor`, *optional*): What the tower should not move away from.
    """

    def __init__(self, conditioner, feedback, generator, reading, mean, std, config, anchor=None):
        self.conditioner = conditioner
        self.feedback = feedback
        self.generator = generator
        self.reading = reading
        self.mean, self.std = mean, std
        self.config = config
        self.anchor = anchor
        # What the training loop sets before each step.
        self.scale = 0.0
        self.seed = 0
        # `target_pixel_values` of the batch, put here before the model runs and taken by the next call of the tower.
        self.target_pixel_values = None
        self.train_loss, self.eval_loss, self.anchor_loss = RunningMean(), RunningMean(), RunningMean()
        self.pending: list[Injection] = []

    def per_image_loss(self, views, look_again=None):
        """
        Returns the feedback of each image of `views`, `(images,)`, with fresh noise.

        Args:
            views (`ImageViews`): What the tower gave.
            look_again (`Callable`, *optional*): `(pixel_values) -> ImageViews`: the tower on other pictures.
        """
        judge, conditions = self._judge(views, look_again)
        return judge(*conditions)

    def _judge(self, views, look_again):
        """Returns the feedback of each image as a function of its conditions, and the conditions."""
        device = views.tokens[0].device
        rng = torch.Generator(device=device).manual_seed(self.seed)
        self.seed += 1  # another micro-batch, other noise
        latents = self._latents(views, rng)
        conditions = self._condition(views, rng)
        if getattr(self.feedback, "second_view", False):
            conditions += self._condition(look_again(self._augmented(views, rng)), rng)

        looking = nullcontext()
        if self.config.shows_maps:
            looking = self.conditioner().looking(self.generator.denoiser.model, dense_maps(views))

        def judge(context, vector, *second_view):
            extra = {} if vector is None else {"vector": vector}
            if second_view:
                extra["second_view"] = second_view
            with looking:
                return self.feedback(latents, context, generator=rng, **extra)

        return judge, conditions

    def _training_loss(self, views, look_again):
        """Returns the mean over the images; nothing but its gradient at the conditions is kept of a frozen network."""
        judge, conditions = self._judge(views, look_again)
        if not self.judge_is_frozen:
            return judge(*conditions).mean()
        return early_gradient(lambda *values: judge(*values).mean(), self.scale, *conditions)

    @property
    def judge_is_frozen(self) -> bool:
        """Whether the conditions are all that the feedback has a gradient for."""
        # A synchroniser, which shows the denoiser maps, trains within it.
        return isinstance(getattr(self.feedback, "denoiser", None), Denoiser) and not self.config.shows_maps

    @torch.no_grad()
    def _latents(self, views, rng):
        """Returns the latents of what the generator must restore."""
        return self.generator.to(views.tokens[0].device).encode(self._pictures(views), generator=rng)

    def _views(self, inputs, output):
        """Returns tokens and picture of each image of a call; None where there is none."""
        return image_views(inputs, output, self.reading)

    def _condition(self, views, rng):
        """Returns context and vector of the images."""
        # A sample of the patches is the training's; evaluation sees them all.
        num_patches = self.config.num_patches if torch.is_grad_enabled() else None
        tokens, mask = condition_tokens(views, self.config.condition, num_patches, rng)
        conditioner = self.conditioner()
        return conditioner(tokens, mask), conditioner.vector(tokens)

    def _augmented(self, views, rng):
        """Returns `pixel_values` of an augmented view of each image."""
        pixel_values = torch.stack(views.pictures)
        if self.config.official_defects:
            return augment_as_published(pixel_values, rng)
        pictures = augment(unnormalize(pixel_values, self.mean, self.std), rng)
        return normalize(pictures, self.mean, self.std).to(pixel_values.dtype)

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
        if not training and (tower.training or not self.config.in_eval):
            return output

        inputs = call_arguments(tower, args, kwargs)
        views = self._views(inputs, output)
        if views is None:
            return output

        def look_again(pixel_values):
            again = {**inputs, "pixel_values": pixel_values}
            # `forward`, not a call: this hook is not to be run for it.
            return self._views(again, tower.forward(**again))

        with self.generator.present(views.tokens[0].device):
            if not training:
                self.eval_loss.add(self.per_image_loss(views, look_again).mean())
                return output
            loss = self._training_loss(views, look_again)
        self.train_loss.add(loss)
        if self.anchor is not None:
            distance = self.anchor.distance(views, inputs, self._views).mean()
            self.anchor_loss.add(distance)
            loss = loss + self.config.anchor_weight * distance
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
