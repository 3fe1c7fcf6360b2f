"""A forward hook that computes the diffusion feedback of a call and sends its gradient back."""

import torch

from .balance import GradientMeter
from .finite import FiniteTally, zero_unless_finite
from .injection import Injection
from .loss import with_targets
from .state import StepState, Sums

# How far an un-normalised picture may lie outside [0, 1], and how much of it, before its statistics must be wrong.
RANGE_MARGIN = 0.05
RANGE_SHARE = 0.01


class TowerSource:
    """Where the feedback is read and injected: at the output of the vision tower of these [`Eyes`]."""

    def __init__(self, eyes):
        self.eyes = eyes
        self.module = eyes.tower
        self.inject = eyes.inject

    def views(self, args, kwargs, output, state: StepState):
        """Returns the views of a call of the tower."""
        return self.eyes.views(self.eyes.call_arguments(args, kwargs), output, state.model_inputs)

    def register(self, hook):
        """Returns handles of further hooks: none."""
        return []

    def check(self, views):
        """Checks the first views of a training, see [`check_reached`] and [`check_range`]."""
        check_reached(self.eyes)
        check_range(views)


def check_reached(eyes):
    """Raises a `ValueError` if no trainable parameter of the tower influences the tokens that are read."""
    trainable = {name for name, value in eyes.tower.named_parameters() if value.requires_grad}
    if trainable & eyes.read_parameters:
        return
    what = f"The vision tower ({type(eyes.tower).__name__})"
    if not trainable:
        raise ValueError(
            f"{what} is frozen: all its parameters have requires_grad=False, so that there is nothing to feed back "
            f"to. Unfreeze it (`tower.requires_grad_(True)`; no `freeze` pattern on it in a recipe; ms-swift: "
            f"`--freeze_vit false`; LLaMA-Factory: `freeze_vision_tower: false`) before the feedback is attached, put "
            f"LoRA on it (axolotl: LoRA targets that include the tower), or leave the feedback out. To train the "
            f"conditioner alone, set `conditioner_only`."
        )
    raise ValueError(
        f"{what} has nothing trainable that influences the tokens that the language model reads: what trains lies "
        f"behind the layer that is read. The feedback would train its conditioner alone. Train earlier layers too, or "
        f"set `conditioner_only`."
    )


def check_range(views):
    """Raises a `ValueError` if the pictures of views do not lie in [0, 1]."""
    values = torch.cat([view.picture.flatten() for view in views])
    outside = ((values < -RANGE_MARGIN) | (values > 1 + RANGE_MARGIN)).float().mean().item()
    if outside > RANGE_SHARE:
        raise ValueError(
            f"{outside:.0%} of the values of the pictures lie outside [0, 1] once their normalisation is undone (from "
            f"{values.min().item():.2f} to {values.max().item():.2f}): `pixel_values` were made with another mean and "
            f"standard deviation. Give the callback the processor that makes them, or set `image_mean` and "
            f"`image_std` of the FeedbackConfig."
        )


class FeedbackHook:
    """
    Computes the feedback inside the model's own forward, where autocast, checkpointing and sharding are already right.

    The tower runs once and serves the language model and the denoiser alike. The gradient of the feedback enters the
    backward pass at the tokens that the language model reads (see [`Injection`]).

    Args:
        source (`TowerSource` or `DecoderSource`): Where views come from.
        loss (`FeedbackLoss` or `RossLoss`): `(views, conditioner, generator, *, scale) -> ImageLosses`.
        conditioner (`Callable`): Returns the conditioner; asked at each call, since wrappers may replace it.
        in_eval (`bool`): Whether evaluation computes it too.
        checks (`bool`): Whether the first views of each training are checked.
        anchor (`Anchor`, *optional*): What the tower should not move away from.
        anchor_weight (`float`): Factor on the distance to it.
        share (`float`): Share of a training step's images that are restored.
        balance (`Balance`, *optional*): Finds the weight.
    """

    def __init__(
        self,
        source,
        loss,
        conditioner,
        in_eval=False,
        checks=True,
        anchor=None,
        anchor_weight=0.0,
        share=1.0,
        balance=None,
    ):
        self.source = source
        self.loss = loss
        self.conditioner = conditioner
        self.in_eval = in_eval
        self.checks = checks
        self.checked = False
        self.anchor = anchor
        self.anchor_weight = anchor_weight
        self.share = share
        self.balance = balance
        # Set by trainings that own their loop: the loss is put into the output and not injected.
        self.returns_loss = False
        self.reset()

    def reset(self):
        """Forgets all that an earlier training, however it ended, has left."""
        self.state, self.eval_state = StepState(), StepState()
        self.sums, self.eval_sums, self.step_sums = Sums(), Sums(), Sums()
        self.tally = FiniteTally()
        self.checked = False

    def register(self, model):
        """Puts hooks on the model and on the module that is read; returns their handles."""
        # What trains within the denoiser has no gradient that could be looked at early.
        guarded = [] if self.loss.is_frozen else list(self.conditioner().parameters())
        return [
            *(parameter.register_hook(zero_unless_finite) for parameter in guarded),
            # First among the hooks, so that it runs before FSDP reshards the tower.
            self.source.module.register_forward_hook(self, prepend=True, with_kwargs=True),
            model.register_forward_pre_hook(self._begin_call, with_kwargs=True),
            model.register_forward_hook(self._end_call),
            *self.source.register(self),
        ]

    def _begin_call(self, module, args, kwargs):
        """Takes `target_pixel_values` out of the batch before the model, which does not know them, sees it."""
        kwargs = dict(kwargs)
        # Set on every call, so that one batch's targets never serve another.
        self.state.target_pixel_values = kwargs.pop("target_pixel_values", None)
        self.state.model_inputs = kwargs
        self.state.awaits_tower = any(
            name.startswith("pixel_values") and value is not None for name, value in kwargs.items()
        )
        return args, kwargs

    def _end_call(self, module, args, output):
        if self.state.awaits_tower and torch.is_grad_enabled() and self.state.scale:
            self.sums.add(unseen=1)
        self.state.awaits_tower, self.state.model_inputs, self.state.target_pixel_values = False, {}, None

    @torch.compiler.disable
    def __call__(self, module, args, kwargs, output):
        """Is called by torch after the module's forward; returns the output with wrapped tokens."""
        state, training = self.state, torch.is_grad_enabled()
        state.awaits_tower = False
        if training and state.scale == 0.0:
            return output
        # TRL also runs training batches without gradients, for its metrics: they are no evaluation.
        # Nor is `generate`, which has no labels.
        evaluates = self.in_eval and (state.model_inputs.get("labels") is not None or self.returns_loss)
        if not training and (module.training or not evaluates):
            return output
        targets, state.target_pixel_values = state.target_pixel_values, None
        meter = None
        if training and isinstance(self.source, TowerSource) and not self.returns_loss:
            meter = GradientMeter(self._add_gradients)
            output = self.source.inject(output, meter.branch)
        views = self.source.views(args, kwargs, output, state)
        if not views:
            return output if meter is None else self.source.inject(output, meter.own)
        if training and self.checks and not self.checked:
            self.source.check(views)
            self.checked = True
        if targets is not None:
            targets = targets.to(views[0].tokens.device).float().clamp(-1, 1) / 2 + 0.5
            views = with_targets(views, targets)
        if not training:
            losses = self._losses_of(views, self.eval_state, 1.0)
            self.eval_sums.add(loss=losses.per_image.sum(), images=losses.images)
            return output
        total = self._total(views)
        if self.anchor is not None:
            distance = self.anchor.distance(views, args, kwargs, self.source, state)
            self.sums.add(anchor=distance, anchored=len({view.image for view in views}))
            total = total + self.anchor_weight * distance
        if self.returns_loss:
            output["feedback_loss"] = total * state.scale
            return output
        injection = Injection(total, state.scale)
        state.pending.append(injection)
        # The language model reads one of these; whichever its backward pass reaches first carries the gradient.
        through = injection.through if meter is None else lambda tokens: injection.through(meter.own(tokens))
        return self.source.inject(output, through)

    def _total(self, views):
        """Returns the sum over the images of a call, or over a share of them for all; their losses are summed up."""
        state, device = self.state, views[0].tokens.device
        drawn = views if self.share == 1.0 else state.draw(views, self.share)
        if not drawn:
            return self.loss.of_none(views, self.conditioner(), state.generator(device))
        losses = self._losses_of(drawn, state, state.scale)
        self.sums.add(**losses.sums())
        return losses.total

    def _losses_of(self, views, state, scale):
        device = views[0].tokens.device
        with self.loss.diffusion_model.on_device(device):
            return self.loss(
                views,
                self.conditioner(),
                state.generator(device),
                scale=scale,
                on_nonfinite=lambda count: self.sums.add(nonfinite=count),
            )

    def _add_gradients(self, text, feedback, product):
        """Sums up what a [`GradientMeter`] has measured, without the loss scale of fp16."""
        factor = self.state.loss_scale**-2
        # Images that count 1 / share times make the squared norm that much larger than that of all images.
        squares = {"text": text * factor, "feedback": feedback * factor * self.share}
        self.sums.add(**squares, product=product * factor)
        if self.balance is not None:
            self.step_sums.add(**squares)

    def check_injected(self):
        """Raises a `RuntimeError` if feedback was computed whose gradient never entered a backward pass."""
        lost = sum(not injection.fired for injection in self.state.pending)
        count = len(self.state.pending)
        self.state.pending.clear()
        if lost:
            raise RuntimeError(
                f"The gradient of {lost} of {count} feedback losses never reached the vision tower: the loss of the "
                f"step did not depend on the tokens of its {type(self.source.module).__name__}, although the language "
                f"model reads them. Is a part of the batch left out of the loss, or its gradient taken by hand?"
            )
