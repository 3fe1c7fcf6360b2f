"""Keeps gradients that are not finite from spreading, where they cannot be looked at before the backward pass."""

import torch


class FiniteGate:
    """
    Lets through, in the backward pass, those rows of a gradient only that are finite.

    Args:
        on_nonfinite (`Callable`, *optional*): Is given the number of other rows, a tensor.
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
