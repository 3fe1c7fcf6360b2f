"""Keeps gradients that are not finite from spreading, where they cannot be looked at before the backward pass."""

import logging

import torch

logger = logging.getLogger(__name__)


# Training stops when more than this share of the views had a loss or gradient that was not finite, ...
NONFINITE_SHARE = 0.05
# ... and so many of them, or all.
NONFINITE_VIEWS = 8


class FiniteTally:
    """Counts the views of a training and those whose feedback was not finite."""

    def __init__(self):
        self.views = self.nonfinite = 0.0

    def add(self, views: float, nonfinite: float):
        """
        Adds the views since the last log, and warns of those that were left out.

        Raises:
            RuntimeError: If more than a small share of all views had no finite loss or gradient.
        """
        if nonfinite:
            logger.warning("The feedback of %d of %d pictures was not finite and was left out.", nonfinite, views)
        self.views += views
        self.nonfinite += nonfinite
        share = self.nonfinite / max(self.views, 1)
        if share > NONFINITE_SHARE and (self.nonfinite >= NONFINITE_VIEWS or (share == 1 and self.views > 1)):
            raise RuntimeError(
                f"The feedback of {self.nonfinite:.0f} of {self.views:.0f} pictures was not finite. They were left "
                f"out, and the weights are unharmed; but the denoiser or the autoencoder overflows. Set the `dtype` "
                f"of the diffusion model to bfloat16 or float32, and look for broken pictures in the data."
            )


class FiniteGate:
    """
    Lets through, in the backward pass, those rows of a gradient only that are finite; `on_nonfinite` is given the
    number of the others, a tensor.
    """

    def __init__(self, on_nonfinite=None):
        self.on_nonfinite = on_nonfinite
        # Rows whose loss is finite, set once it is known; the others are counted by then.
        self.finite = None

    def through(self, value):
        """Returns `value` `(batch, ...)` unchanged; None stays None."""
        return None if value is None else _Gate.apply(value, self)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, gate):
        ctx.gate = gate
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):
        finite = gradient.flatten(1).isfinite().all(dim=1)
        gate = ctx.gate
        if gate.on_nonfinite is not None:
            gate.on_nonfinite((~finite & gate.finite).sum())
        rows = (finite & gate.finite).view(-1, *[1] * (gradient.dim() - 1))
        return torch.where(rows, gradient, 0.0), None


def zero_unless_finite(gradient):
    """Returns the gradient of a parameter, or zeros if any of it is not finite: a hook for parameters."""
    return torch.where(gradient.isfinite().all(), gradient, 0.0)
