"""How strong the feedback's gradient is beside the text's, and the weight that brings it to a given ratio."""

import math

import torch

# Share of the past in the squared norms that are averaged over the steps: about the last 30 of them count.
DECAY = 0.97
# How far the weight may move from where it starts, as a factor.
MOST = 100.0


class GradientMeter:
    """
    Tells two gradients at a tower's tokens apart: the model's own comes by one branch, the feedback's by another.

    Both are there when the backward pass leaves the branches, so that measuring keeps nothing alive.

    Args:
        add (`Callable`): Is given the squared norms `text` and `feedback` and their inner product `product`, scalars;
            of a call with a norm that is not finite, zeros.
    """

    def __init__(self, add):
        self.add = add
        self._own = {}

    def branch(self, tokens):
        """Returns the tokens `(..., dim)` for the feedback; a tensor without a graph as it is."""
        if not tokens.requires_grad:
            return tokens
        own, branch = _Branches.apply(tokens, self)
        self._own[id(branch)] = own
        return branch

    def own(self, branch):
        """Returns for what [`branch`] gave the same tokens for the model itself."""
        return self._own.pop(id(branch), branch)


class _Branches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, meter):
        ctx.meter = meter
        ctx.set_materialize_grads(False)
        return tokens.view_as(tokens), tokens.view_as(tokens)

    @staticmethod
    def backward(ctx, text, feedback):
        if text is None or feedback is None:
            return feedback if text is None else text, None
        squares = [torch.linalg.vector_norm(gradient, dtype=torch.float32).square() for gradient in (text, feedback)]
        values = torch.stack([*squares, (text.float() * feedback.float()).sum()])
        values = torch.where(values.isfinite().all(), values, 0.0)
        ctx.meter.add(**dict(zip(("text", "feedback", "product"), values, strict=True)))
        return text + feedback, None


class Balance:
    """
    Sets the feedback's weight so that the norm of its gradient at the tower's tokens is `ratio` times that of the
    text's, as autoencoders weigh their GAN loss (VQGAN, https://arxiv.org/abs/2012.09841, Eq. 7).

    A step's weight is decided by the steps before it, so that it does not depend on how the step is cut. Both squared
    norms are averaged over the steps by the same factors, which their ratio therefore does not see.

    The average begins as if the weight were right: a loud feedback is hushed within a step or two, and a silent one
    raised by 1.5 % a step at most. The conditioner starts near zero, and a weight that made up for that at once would
    leave nothing of the text's gradient within a clipped norm.

    Args:
        ratio (`float`): Above 0.
        start (`float`): The weight until something was measured.
    """

    def __init__(self, ratio: float, start: float):
        self.ratio = ratio
        self.start = start
        # Averages of squared norms; of the feedback's at a weight of 1.
        self.text = self.feedback = 0.0

    @property
    def weight(self) -> float:
        """The weight of the next step, at most 100 times the start and at least a hundredth of it."""
        if not self.text:
            return self.start
        weight = self.ratio * math.sqrt(self.text / self.feedback)
        return min(max(weight, self.start / MOST), self.start * MOST)

    def update(self, text: float, feedback: float):
        """Takes in a step's squared norms over all ranks, the feedback's as it was with the step's weight."""
        unit = feedback / self.weight**2
        if not self.text:
            self.text, self.feedback = text, text * (self.ratio / self.start) ** 2
        self.text = DECAY * self.text + (1 - DECAY) * text
        self.feedback = DECAY * self.feedback + (1 - DECAY) * unit
