"""Adds the gradient of a loss to a backward pass that does not know of it."""

import torch


class Injection:
    """One computed scalar loss on its way into a backward pass, and the factor (`scale`) on its gradient."""

    def __init__(self, loss, scale):
        self.loss = loss
        self.scale = scale
        self.fired = False

    def through(self, tokens):
        """Returns `tokens` unchanged; a backward pass through them also runs that of the loss, once."""
        return _AddLossGradient.apply(tokens, self.loss, self)

    def _take(self, like):
        scale = 0.0 if self.fired else self.scale
        self.fired = True
        return torch.full_like(like, scale)


class _AddLossGradient(torch.autograd.Function):
    """
    Identity on tokens whose backward gives `loss` a gradient.

    `transformers.Trainer` has no event that adds a loss, and `outputs.loss` is no safe ground: it is scaled in
    several ways under gradient accumulation, dropped by label smoothing, ignored by TRL. The tokens are on the path of
    every language-model loss, whatever is done to it. Megatron-LM adds the losses of its expert routers in this way.
    """

    @staticmethod
    def forward(ctx, tokens, loss, injection):
        """Returns a copy of the tokens."""
        ctx.injection = injection
        ctx.save_for_backward(loss)
        # A clone, not a view: some models change their tower's output in place.
        return tokens.clone()

    @staticmethod
    def backward(ctx, grad_tokens):
        """Returns the tokens' gradient as it came, and the factor on the loss's."""
        (loss,) = ctx.saved_tensors
        return grad_tokens, ctx.injection._take(loss), None
