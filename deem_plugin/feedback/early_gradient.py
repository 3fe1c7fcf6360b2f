"""The gradient of a loss at its inputs, taken in the forward pass, so that the way to them need not be kept."""

import torch


def early_gradient(errors_of, weights, scale, *inputs):
    """
    Computes errors and at once the gradient of their weighted sum at the inputs; a later backward pass only multiplies
    what is kept. What a frozen network computed on the way is then free again before anything else runs. The gradient
    is the same as without, but for rows that are not finite: these are left out.

    Args:
        errors_of (`Callable`): `(*inputs) -> (batch,)`. Nothing else that it depends on gets a gradient.
        weights (`torch.Tensor`): Weight of each error in the sum, `(batch,)`.
        scale (`float`): The factor that the backward pass is going to bring, not 0. The gradient is taken with it, so
            that float16 does not underflow.
        inputs (`torch.Tensor` or None): With their graph, `(batch, ...)`.

    Returns:
        `tuple`: The weighted sum with a graph to the inputs, the errors `(batch,)`, and which of them are finite and
        have a finite gradient, bool, `(batch,)`.
    """
    leaves = [None if value is None else value.detach().requires_grad_() for value in inputs]
    with torch.enable_grad():
        # Views: hooks on modules, such as those that count FLOPs, cannot follow leaves through `autograd.grad`.
        errors = errors_of(*(None if leaf is None else leaf.view_as(leaf) for leaf in leaves))
        finite = errors.isfinite()
        total = (torch.where(finite, errors, 0.0) * weights).sum()
    given = [leaf for leaf in leaves if leaf is not None]
    if any(value is not None and value.requires_grad for value in inputs):
        # As in any backward pass, autocast has no say.
        with torch.autocast(total.device.type, enabled=False):
            gradients = torch.autograd.grad(total, given, torch.full_like(total, scale))
        for gradient in gradients:
            finite = finite & gradient.flatten(1).isfinite().all(dim=1)
        gradients = [torch.where(_like(finite, gradient), gradient, 0.0) for gradient in gradients]
        total = (torch.where(finite, errors, 0.0) * weights).sum()
        tensors = [value for value in inputs if value is not None]
        total = _KeptGradient.apply(total.detach(), scale, gradients, *tensors)
    return total, errors.detach(), finite


def _like(rows, tensor):
    return rows.view(-1, *[1] * (tensor.dim() - 1))


class _KeptGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, total, scale, gradients, *inputs):
        ctx.scale = scale
        ctx.save_for_backward(*gradients)
        return total.clone()

    @staticmethod
    def backward(ctx, factor):
        kept = [gradient * (factor / ctx.scale).to(gradient.dtype) for gradient in ctx.saved_tensors]
        return None, None, None, *kept
