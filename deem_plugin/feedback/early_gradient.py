"""The gradient of a loss at its inputs, taken in the forward pass, so that the way to them need not be kept."""

import torch


def early_gradient(loss_of, scale, *inputs):
    """
    Computes a loss and at once its gradient at the inputs; a later backward pass only multiplies what is kept.

    What a frozen network computed on the way to the loss is then free again before anything else runs, and so may be
    the network itself. The gradient is the same as without.

    Args:
        loss_of (`Callable`): `(*inputs) -> scalar`. Nothing else that it depends on gets a gradient.
        scale (`float`): The factor that the backward pass is going to bring, not 0. The gradient is taken with it, so
            that float16 does not underflow.
        inputs (`torch.Tensor` or None): With their graph.

    Returns:
        `torch.Tensor`: The loss, with a graph to the inputs.
    """
    return _EarlyGradient.apply(loss_of, scale, *inputs)


class _EarlyGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss_of, scale, *inputs):
        leaves = [None if value is None else value.detach().requires_grad_() for value in inputs]
        with torch.enable_grad():
            # Views: hooks on modules, such as those that count FLOPs, cannot follow leaves through `autograd.grad`.
            loss = loss_of(*(None if leaf is None else leaf.view_as(leaf) for leaf in leaves))
        given = [leaf for leaf in leaves if leaf is not None]
        # As in any backward pass, autocast has no say.
        with torch.autocast(loss.device.type, enabled=False):
            gradients = torch.autograd.grad(loss, given, torch.full_like(loss, scale))
        ctx.scale = scale
        ctx.places = [index for index, leaf in enumerate(leaves) if leaf is not None]
        ctx.save_for_backward(*gradients)
        return loss.detach()

    @staticmethod
    def backward(ctx, factor):
        results = [None] * len(ctx.needs_input_grad)
        for place, gradient in zip(ctx.places, ctx.saved_tensors, strict=True):
            results[place + 2] = gradient * (factor / ctx.scale).to(gradient.dtype)
        return tuple(results)
