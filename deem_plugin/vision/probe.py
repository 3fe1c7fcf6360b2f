"""Shows a picture to a vision-language model, and asks autograd what of its tower's output is read."""

import inspect
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .layouts import Grid, call_arguments
from .normalization import process_image
from .outputs import count_tokens, mapped, tensors_of
from .towers import vision_encoders

# Fields of an output that pass on what the tower gave, beside what was made of it for the language model.
_PASSED_ON = ("last_hidden_state", "hidden_states", "attentions")
# Side of the picture that measures a tower without a fixed size, in pixels.
_PROBE_SIZE = 224
# Tells how many tiles of each picture are in a second call of the tower, the first of which has the thumbnails.
LOCAL_COUNTS = "num_local_patches"


@dataclass
class Call:
    """The call of the tower while a picture was shown to the model."""

    inputs: dict  # arguments by name
    outputs: dict  # path of each tensor of the output -> the tensor, on the tower's graph
    read: dict  # path of each tensor that the language model reads -> gradient at it
    options: dict  # arguments that are no pictures
    features: int  # tokens that the language model gets


def show_picture(model, tower, layout, image_processor) -> Call:
    """Shows a picture to the model: a wide one, or, where its processor does not resize, one of the tower's size."""
    size = getattr(tower.config, "image_size", None) if isinstance(layout, Grid) else None
    size = size or _PROBE_SIZE
    size = min(min(size) if isinstance(size, list | tuple) else size, 2 * _PROBE_SIZE)
    if image_processor is None:
        return _measure(model, tower, layout.pack([torch.zeros(3, size, size)]))
    try:
        return _measure(model, tower, _processed(image_processor, 2 * size, size))
    except ValueError as wide:
        if not isinstance(wide.__cause__, ValueError | RuntimeError):
            raise
    return _measure(model, tower, _processed(image_processor, size, size))


def _processed(image_processor, width, height) -> dict:
    """Returns what an image processor makes of the probe's picture."""
    from PIL import Image

    pixels = (_probe_picture(height, width) * 255).round().byte()
    return process_image(image_processor, Image.fromarray(pixels.permute(1, 2, 0).numpy()))


def _probe_picture(height, width):
    """Returns a picture `(3, height, width)` in [0, 1], dark on the left, bright on the right, with slopes in both."""
    x = torch.linspace(0, 1, width).expand(height, width)
    y = torch.linspace(0, 1, height)[:, None].expand(height, width)
    half = (x > 0.5).float() * 0.6
    return torch.stack([half + 0.4 * x, half + 0.4 * y, half + 0.4 * (1 - y)])


def difference_to_shown(picture) -> float:
    """Returns the mean difference of a picture and the probe's at its size."""
    return (picture - _probe_picture(*picture.shape[-2:]).to(picture)).abs().mean().item()


def _measure(model, tower, inputs) -> Call:
    """Shows a picture to the model and asks autograd which tensors of the tower's output it depends on."""
    calls, seen = [], []

    def leaves(module, args, kwargs, output):
        tensors, copies = {}, {}

        def cut(path, tensor):
            if not tensor.is_floating_point():
                return tensor
            tensors[path], copies[path] = tensor, tensor.detach().requires_grad_()
            return copies[path].clone()  # some models change the output in place

        arguments = call_arguments(tower, args, kwargs)
        output = mapped(output, cut)
        calls.append((arguments, tensors, copies))
        return output

    handles = [tower.register_forward_hook(leaves, with_kwargs=True)]
    for name, module in _other_towers(model, tower).items():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: seen.append(name)))
    try:
        with torch.enable_grad(), in_evaluation(model):
            result = see(model, tower, cast(inputs, tower))
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(
            f"How a {type(model).__name__} reads its vision tower ({type(tower).__name__}) could not be measured: "
            f"showing it a picture gave {type(error).__name__}: {error}. The feedback does not know this model."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if seen:
        raise ValueError(
            f"A {type(model).__name__} looks at each picture by two vision towers, {type(tower).__name__} and "
            f"`{seen[0]}`, and the feedback would train one of them only. It does not support such models."
        )
    if len(calls) != 1 and (not calls or inputs.get(LOCAL_COUNTS) is None):
        raise ValueError(
            f"A {type(model).__name__} called its vision tower ({type(tower).__name__}) {len(calls)} times for one "
            f"picture; the feedback expects one call, or one for thumbnails and one for tiles with `{LOCAL_COUNTS}`."
        )
    reads = [_gradients(result, copies) for _, _, copies in calls]
    arguments, tensors, _ = calls[0]
    read = reads[0]
    if any(set(other) != set(read) for other in reads):
        raise ValueError(
            f"A {type(model).__name__} reads other outputs of its vision tower ({type(tower).__name__}) in its second "
            f"call for a picture than in its first; the feedback expects the same."
        )
    if not read:
        raise ValueError(
            f"What a {type(model).__name__} makes of a picture does not depend on the output of its vision tower "
            f"({type(tower).__name__}), so that feedback there could teach it nothing."
        )
    options = {name: value for name, value in arguments.items() if _is_option(value)}
    return Call(arguments, tensors, read, options, count_tokens(result))


def see(model, tower, inputs):
    """Returns what the language model gets of a picture, or, where the model has no such method, what it says."""
    if tower is model:
        return [model(**_known(model.forward, inputs)).last_hidden_state]
    owner = next((m for m in (model, model.base_model) if hasattr(m, "get_image_features")), None)
    # Where a text is asked for, too: one token.
    token = torch.ones(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    if owner is None:
        names = inspect.signature(model.forward).parameters
        text = {"input_ids": token, "attention_mask": torch.ones_like(token), "decoder_input_ids": token}
        if "image_attention_mask" in names:  # Idefics: which token sees which image
            text["image_attention_mask"] = token[..., None]
            inputs = {**inputs, "pixel_values": inputs["pixel_values"][None]}
        text = {name: value for name, value in text.items() if name in names}
        return [model(**text, **_known(model.forward, inputs)).logits]
    given = _known(owner.get_image_features, inputs)
    if owner is model and hasattr(model.base_model, "get_image_features"):  # which may pass more on
        given = {**_known(model.base_model.get_image_features, inputs), **given}
    for name, parameter in inspect.signature(owner.get_image_features).parameters.items():
        if parameter.default is parameter.empty and name.endswith("input_ids"):
            given[name] = token
    result = owner.get_image_features(**given)
    names = list(result.keys()) if hasattr(result, "keys") else None
    if names is None:
        return result
    features = result.get("pooler_output")
    # What else the language model gets has as many tokens (DeepStack); other fields are the tower's own affair.
    others = tensors_of([result[name] for name in names if name not in (*_PASSED_ON, "pooler_output")])
    if features is None:
        return others or [result["last_hidden_state"]]
    return [features, *(other for other in others if count_tokens(other) == count_tokens(features))]


def _known(function, inputs) -> dict:
    """Returns those of an image processor's outputs that a function takes, by its own name for the pixels."""
    names = list(inspect.signature(function).parameters)
    known = {name: value for name, value in inputs.items() if name in names}
    if "pixel_values" in inputs and "pixel_values" not in names:
        pixels = [name for name in names if name.startswith("pixel_values") and "video" not in name]
        known |= {name: inputs["pixel_values"] for name in pixels[:1]}
    return known


def _gradients(result, copies) -> dict:
    """Returns the gradient at each of `copies` that `result` depends on."""
    tensors = [tensor for tensor in tensors_of(result) if tensor.requires_grad]
    if not tensors:
        return {}
    # Random, since the sum of what a layer norm gives has no gradient.
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype) for tensor in tensors]
    gradients = torch.autograd.grad(tensors, list(copies.values()), directions, allow_unused=True, retain_graph=True)
    return {path: gradient for path, gradient in zip(copies, gradients, strict=True) if gradient is not None}


def _other_towers(model, tower):
    """Returns vision encoders within a model, by name, that are neither its tower nor a part of it nor around it."""
    own = set(tower.modules())
    return {
        name: module
        for name, module in vision_encoders(model).items()
        if module not in own and not any(part is tower for part in module.modules())
    }


@contextmanager
def in_evaluation(model):
    """Evaluation mode while the context lasts, so that nothing is drawn; then each module's own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def cast(inputs, tower) -> dict:
    """Puts an image processor's outputs where the tower is, floats in its precision."""
    parameter = next(tower.parameters())
    cast = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            value = value.to(parameter.device)
            value = value.to(parameter.dtype) if value.is_floating_point() else value
        cast[name] = value
    return cast


def _is_option(value) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list) or value == ()
