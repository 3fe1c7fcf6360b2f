"""The eyes of a vision-language model: its tower, the layout of its pictures, and what the language model reads."""

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from .layouts import Grid, Layout, call_arguments, layout_of
from .towers import find_tower, is_encoder, vision_encoders, without_peft
from .views import View, bars

# Fields of an output that pass on what the tower gave, beside what was made of it for the language model.
_PASSED_ON = ("last_hidden_state", "hidden_states", "attentions")
# Class and register tokens that a tower may have, where they can be told by their number only.
_MOST_SPECIAL_TOKENS = 8
# Mean difference between the picture that is shown and the one that comes back: more than resizing makes.
_PICTURE_TOLERANCE = 0.06
# Tells how many tiles of each picture are in a second call of the tower, the first of which has the thumbnails.
_LOCAL_COUNTS, _LOCAL_PIXELS = "num_local_patches", "pixel_values_local"
# Side of the picture that measures a tower without a fixed size, in pixels.
_PROBE_SIZE = 224


@dataclass
class Reading:
    """
    Which of a tower's outputs the language model reads, so that the feedback acts on the same tokens and on no others.

    A class token that the language model never sees would be a hiding place: the tower could store there what the
    denoiser asks for, and the language model would gain nothing.

    Args:
        paths (`list[tuple]`): Keys of each tensor that is read within the tower's output, from the outside in. Several
            with the same tokens (layers, DeepStack) are concatenated.
        rows (`list[int]`, *optional*): Tokens that are read of each picture; all by default.
        first (`int`): The first token that is read, where all that follow are.
    """

    paths: list[tuple]
    rows: list[int] | None = None
    first: int = 0

    def select(self, output) -> torch.Tensor:
        """Returns the tokens that are read of a tower's output, `(..., tokens, dim)`."""
        tokens = torch.cat([_tokens_last(_at(output, path)) for path in self.paths], dim=-1)
        if self.rows is not None:
            return tokens[..., self.rows, :]
        return tokens[..., self.first :, :] if self.first else tokens


@dataclass
class Eyes:
    """
    How a vision-language model sees, measured once on a picture that is shown to it.

    Args:
        tower (`nn.Module`): The vision tower.
        layout (`Layout`): How it lays out its pictures.
        reading (`Reading`): Which of its outputs the language model reads.
        width (`int`): Width of the tokens that are read.
        pooled_width (`int`): Width of the tower's pooled vector; 0 without one.
        mean, std (`Sequence[float]`): Normalisation of the pictures.
        read_parameters (`set[str]`): Trainable parameters of the tower that the tokens depend on, by name.
        tiles (`bool`): Whether the processor cuts pictures into tiles, each a row of the call.
        thumbnail (`int`, *optional*): Place of the thumbnail among the tiles of an image: 0, -1, or none.
        image_token_id (`int`, *optional*): Marks the places of an image in `input_ids`.
        options (`dict`): Arguments that the model calls the tower with beside its pictures.
    """

    tower: nn.Module
    layout: Layout
    reading: Reading
    width: int
    mean: Sequence[float]
    std: Sequence[float]
    read_parameters: set[str]
    pooled_width: int = 0
    tiles: bool = False
    thumbnail: int | None = None
    image_token_id: int | None = None
    options: dict = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, processor=None, mean=None, std=None) -> "Eyes":
        """
        Measures a model.

        Args:
            model (`nn.Module`): A vision-language model, also behind PEFT, or a vision encoder alone.
            processor (*optional*):
                Its processor or image processor. Given a tokenizer or nothing, the image processor is looked for
                where the model came from.
            mean, std (`Sequence[float]`, *optional*): Normalisation of the pictures; the processor's own by default.

        Raises:
            ValueError: If the model has no vision tower or several, the layout of its pictures is not known, or the
                normalisation is not; says which.
        """
        base = without_peft(model)
        tower = find_tower(base)
        layout = layout_of(tower)
        image_processor = find_image_processor(base, processor)
        mean, std = normalization(image_processor, processor, mean, std)
        call = _show(base, tower, layout, image_processor)
        reading = _reading_of(call, layout)
        tokens = reading.select(call.outputs)
        eyes = cls(
            tower=tower,
            layout=layout,
            reading=reading,
            width=tokens.shape[-1],
            mean=mean,
            std=std,
            read_parameters=_parameters_of(tower, [call.outputs[path] for path in call.read]),
            pooled_width=_pooled_width(call.outputs),
            image_token_id=_image_token_id(base.config),
            options=call.options,
        )
        if not (tokens.is_meta or image_processor is None):
            eyes.layout = eyes._layout_of_shown(call, layout.candidates(call.inputs, tokens))
        views = eyes._split(call.inputs, call.outputs)
        if isinstance(layout, Grid) and not is_encoder(base) and len(views) > 1 and not tokens.is_meta:
            eyes.tiles = True
            eyes.thumbnail = _find_thumbnail(views)
        return eyes

    def call_arguments(self, args, kwargs) -> dict:
        """Returns the arguments of a call of the tower by name."""
        return call_arguments(self.tower, args, kwargs)

    def views(self, inputs: dict, output, model_inputs: dict | None = None) -> list[View]:
        """
        Takes one call of the tower apart.

        Args:
            inputs (`dict`): Arguments of the call, by name.
            output: What the tower returned.
            model_inputs (`dict`, *optional*): What the model was called with, which tells which tiles and frames
                belong together. Without it each row of a grid is an image.

        Returns:
            `list[View]`: Pictures in [0, 1]; all-zero rows, with which some models pad, are left out.

        Raises:
            ValueError: If pictures and tokens do not agree.
        """
        views = self._split(inputs, output)
        if isinstance(self.layout, Grid) and model_inputs is not None:
            if model_inputs.get(_LOCAL_COUNTS) is not None:
                views = self._of_two_calls(views, inputs, model_inputs)
            else:
                views = self._grouped(views, model_inputs)
        if "patch_attention_mask" in self.layout.names:
            # SmolVLM sends a picture of zeros where there is none.
            views = [view for view in views if view.picture.any()]
        views = [replace(view, picture=self.unnormalize(view.picture)) for view in views]
        return [
            replace(view, mask=bars(view.picture))
            if self.layout.letterboxed or view.kind in ("tile", "thumbnail")
            else view
            for view in views
        ]

    @torch.no_grad()
    def show(self, model: nn.Module, inputs: dict) -> list[View]:
        """
        Shows images to the model as its image processor makes them, without a text.

        Args:
            model (`nn.Module`): The model that these are the eyes of.
            inputs (`dict`): What the image processor gave.
        """
        views = []

        def note(module, args, kwargs, output):
            views.extend(self.views(self.call_arguments(args, kwargs), output, inputs))

        handle = self.tower.register_forward_hook(note, with_kwargs=True)
        try:
            _see(without_peft(model), self.tower, _cast(inputs, self.tower))
        finally:
            handle.remove()
        return views

    def look(self, pictures: list[torch.Tensor]) -> list[View]:
        """
        Shows pictures to the tower itself, each one a view.

        Args:
            pictures (`list[torch.Tensor]`): Each `(3, height, width)` in [0, 1], of a size that the layout takes.
        """
        parameter = next(self.tower.parameters())
        normalized = [self.normalize(picture).to(parameter) for picture in pictures]
        inputs = {**self.options, **self.layout.pack(normalized)}
        # `forward`, not a call: hooks on the tower belong to the model's own calls.
        return self.views(inputs, self.tower.forward(**inputs))

    def inject(self, output, through: Callable):
        """Replaces, in a tower's output, each tensor that the language model reads by what `through` returns of it."""
        for path in self.reading.paths:
            output = _replaced(output, path, through)
        return output

    def normalize(self, picture: torch.Tensor) -> torch.Tensor:
        """Pictures `(..., 3, height, width)` in [0, 1] to what the tower is shown, float32."""
        return (picture.float() - self._statistic(self.mean, picture)) / self._statistic(self.std, picture)

    def unnormalize(self, picture: torch.Tensor) -> torch.Tensor:
        """Undoes [`normalize`]. Not clamped."""
        return picture.float() * self._statistic(self.std, picture) + self._statistic(self.mean, picture)

    @staticmethod
    def _statistic(values, like):
        return torch.as_tensor(values, device=like.device, dtype=torch.float32).view(-1, 1, 1)

    def _layout_of_shown(self, call, candidates):
        """Returns the layout by which the picture comes back that was shown; raises a `ValueError` if none does."""
        differences = []
        for layout in candidates:
            views = replace(self, layout=layout)._split(call.inputs, call.outputs)
            differences.append(max(_difference(self.unnormalize(view.picture)) for view in views))
        least = min(differences)
        # A grid has pictures of any cut, of which the right order comes closest.
        if least > _PICTURE_TOLERANCE and not isinstance(self.layout, Grid):
            raise ValueError(
                f"The pictures in a call of the vision tower ({type(self.tower).__name__}) cannot be put together: "
                f"the one that was shown comes back with a mean difference of {least:.2f} (of 1). Its patches are "
                f"laid out in an order that the feedback does not know."
            )
        return candidates[differences.index(least)]

    def _split(self, inputs, output):
        tokens = self.reading.select(output)
        views = self.layout.split(inputs, tokens)
        pooled, maps = _field(output, "pooler_output"), _field(output, "maps")
        if pooled is not None and pooled.dim() == 2 and len(pooled) == len(views):
            views = [replace(view, pooled=vector) for view, vector in zip(views, pooled, strict=True)]
        if maps is not None:
            views = [
                replace(view, maps={name: level[index] for name, level in maps.items()})
                for index, view in enumerate(views)
            ]
        return views

    def _grouped(self, views, model_inputs):
        """Tells which rows of a grid are tiles or frames of one image."""
        counts, kind = _rows_per_image(model_inputs, len(views), self)
        if counts is None:
            return views
        grouped = []
        for image, count in enumerate(counts):
            rows = views[len(grouped) : len(grouped) + count]
            kinds = [kind if count > 1 else "image"] * count
            if count > 1 and kind == "tile" and self.thumbnail is not None:
                kinds[self.thumbnail] = "thumbnail"
            grouped += [replace(view, image=image, kind=own) for view, own in zip(rows, kinds, strict=True)]
        return grouped

    def _of_two_calls(self, views, inputs, model_inputs):
        """Tells, in a call for thumbnails or for tiles, which image each row belongs to (DeepSeek-OCR 2)."""
        counts = torch.as_tensor(model_inputs[_LOCAL_COUNTS]).tolist()
        tiles = model_inputs.get(_LOCAL_PIXELS)
        shown = inputs[self.layout.pixels]
        if tiles is not None and shown.shape == tiles.shape and torch.equal(shown, tiles.to(shown)):
            images = [image for image, count in enumerate(counts) for _ in range(count)]
            return [
                replace(view, image=image, kind="tile", elsewhere=1) for view, image in zip(views, images, strict=True)
            ]
        return [
            replace(view, kind="thumbnail" if count else "image", elsewhere=count)
            for view, count in zip(views, counts, strict=True)
        ]


def find_image_processor(model, processor):
    """
    Returns the image processor of a model: that of its processor, or the one where the model came from, which
    frameworks that hand on the tokenizer alone leave to be found; None if there is none.
    """
    image_processor = getattr(processor, "image_processor", processor)
    if hasattr(image_processor, "image_mean") or hasattr(image_processor, "do_rescale"):
        return image_processor
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        return None
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError, KeyError):
        return None


def normalization(image_processor, processor, mean=None, std=None):
    """
    Returns mean and std that pictures are normalised with.

    Args:
        image_processor: Tells its own; may be None.
        processor: What was given, for the error.
        mean, std (`Sequence[float]`, *optional*): Win where they are given.

    Raises:
        ValueError: If nobody knows.
    """
    if mean is not None:
        return list(mean), list(std)
    if image_processor is not None and getattr(image_processor, "do_normalize", True) is False:
        return [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
    mean, std = getattr(image_processor, "image_mean", None), getattr(image_processor, "image_std", None)
    if mean is None and hasattr(image_processor, "do_normalize"):
        raise ValueError(
            f"{type(image_processor).__name__} normalises each picture by statistics of its own, which the feedback "
            f"cannot undo to get the picture that the diffusion model must restore. It does not support such models."
        )
    if mean is None or std is None:
        raise ValueError(
            f"The pictures that the diffusion model must restore are made of `pixel_values`, whose normalisation is "
            f"not known: processing_class={type(processor).__name__} has no image_mean and image_std, and no image "
            f"processor was found where the model came from. Give the Trainer the model's processor "
            f"(`processing_class=processor`), or set `image_mean` and `image_std` of the FeedbackConfig."
        )
    return mean, std


@dataclass
class _Call:
    """The call of the tower while a picture was shown to the model."""

    inputs: dict  # arguments by name
    outputs: dict  # path of each tensor of the output -> the tensor, on the tower's graph
    read: dict  # path of each tensor that the language model reads -> gradient at it
    options: dict  # arguments that are no pictures
    features: int  # tokens that the language model gets


def _show(model, tower, layout, image_processor) -> _Call:
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


def _difference(picture) -> float:
    """Returns the mean difference of a picture and the probe's at its size."""
    return (picture - _probe_picture(*picture.shape[-2:]).to(picture)).abs().mean().item()


def process_image(image_processor, image) -> dict:
    """Returns what an image processor makes of one image."""
    try:
        inputs = image_processor(images=[image], return_tensors="pt")
    except (ValueError, TypeError):  # one list of images for each text
        inputs = image_processor(images=[[image]], return_tensors="pt")
    return {"pixel_values": inputs} if isinstance(inputs, torch.Tensor) else dict(inputs)


def _measure(model, tower, inputs) -> _Call:
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
        output = _mapped(output, cut)
        calls.append((arguments, tensors, copies))
        return output

    handles = [tower.register_forward_hook(leaves, with_kwargs=True)]
    for name, module in _other_towers(model, tower).items():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: seen.append(name)))
    try:
        with torch.enable_grad(), _quiet(model):
            result = _see(model, tower, _cast(inputs, tower))
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
    if len(calls) != 1 and (not calls or inputs.get(_LOCAL_COUNTS) is None):
        raise ValueError(
            f"A {type(model).__name__} called its vision tower ({type(tower).__name__}) {len(calls)} times for one "
            f"picture; the feedback expects one call, or one for thumbnails and one for tiles with `{_LOCAL_COUNTS}`."
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
    return _Call(arguments, tensors, read, options, _count(result))


def _see(model, tower, inputs):
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
    others = _tensors([result[name] for name in names if name not in (*_PASSED_ON, "pooler_output")])
    if features is None:
        return others or [result["last_hidden_state"]]
    return [features, *(other for other in others if _count(other) == _count(features))]


def _tensors(values) -> list[torch.Tensor]:
    """Returns all tensors within an output."""
    tensors = []
    _mapped(values, lambda path, tensor: tensors.append(tensor) or tensor)
    return tensors


def _count(values) -> int:
    """Returns the number of tokens within an output."""
    return sum(tensor.numel() // tensor.shape[-1] for tensor in _tensors(values) if tensor.dim() > 1)


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
    tensors = [tensor for tensor in _tensors(result) if tensor.requires_grad]
    if not tensors:
        return {}
    # Random, since the sum of what a layer norm gives has no gradient.
    generator = torch.Generator().manual_seed(0)
    directions = [
        torch.ones_like(tensor)
        if tensor.is_meta
        else torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
        for tensor in tensors
    ]
    gradients = torch.autograd.grad(tensors, list(copies.values()), directions, allow_unused=True, retain_graph=True)
    return {path: gradient for path, gradient in zip(copies, gradients, strict=True) if gradient is not None}


def _reading_of(call: _Call, layout: Layout) -> Reading:
    """Chooses, of the tensors that are read, those with most tokens, and of a grid the rows with a gradient."""
    shapes = {path: _tokens_last(gradient).shape[:-1] for path, gradient in call.read.items()}
    most = max(shapes.values(), key=math.prod)
    paths = [path for path, shape in shapes.items() if shape == most]
    reading = Reading(paths)
    gradients = [_tokens_last(call.read[path]) for path in paths]
    if not layout.fixed_rows or gradients[0].dim() < 3:
        return reading
    if gradients[0].is_meta:  # without values: so many of the first are left out as the language model gets fewer
        surplus = gradients[0].shape[1] - call.features
        return Reading(paths, first=surplus if 0 < surplus <= _MOST_SPECIAL_TOKENS else 0)
    read = torch.stack([(gradient != 0).any(dim=-1) for gradient in gradients]).flatten(0, -2).any(dim=0)
    if not read.any():  # a projector that starts at zero passes no gradient yet
        return reading
    first = int(read.long().argmax())
    if read[first:].all():
        return Reading(paths, first=first)
    return Reading(paths, rows=read.nonzero().flatten().tolist())


def _parameters_of(tower, tensors) -> set[str]:
    """Returns the names of the tower's trainable parameters that tensors depend on."""
    trainable = {name: value for name, value in tower.named_parameters() if value.requires_grad}
    tensors = [tensor for tensor in tensors if tensor.requires_grad]
    if not trainable or not tensors:
        return set()
    total = sum(tensor.float().sum() for tensor in tensors)
    gradients = torch.autograd.grad(total, list(trainable.values()), allow_unused=True)
    return {name for name, gradient in zip(trainable, gradients, strict=True) if gradient is not None}


def _other_towers(model, tower):
    """Returns vision encoders within a model, by name, that are neither its tower nor a part of it nor around it."""
    own = set(tower.modules())
    return {
        name: module
        for name, module in vision_encoders(model).items()
        if module not in own and not any(part is tower for part in module.modules())
    }


def _rows_per_image(model_inputs, rows, eyes):
    """Returns how many rows of a grid belong to each image, and whether they are tiles or frames; None if one each."""
    crops = model_inputs.get("image_num_crops")
    if crops is not None and int(crops.sum()) == rows:
        return crops.tolist(), "tile"
    for name, pixels in model_inputs.items():
        if name.startswith("pixel_values") and isinstance(pixels, torch.Tensor) and pixels.dim() == 5:
            kind = "frame" if "video" in name else "tile"
            if pixels.shape[0] * pixels.shape[1] == rows:
                return [pixels.shape[1]] * pixels.shape[0], kind
            # Padded with zeros to the most tiles of the batch.
            counts = (pixels.flatten(2) != 0).any(dim=-1).sum(dim=1).tolist()
            if sum(counts) == rows:
                return [count for count in counts if count], kind
    ids = model_inputs.get("input_ids")
    if not eyes.tiles or ids is None or eyes.image_token_id is None:
        return None, "image"
    runs = _runs(ids == eyes.image_token_id)
    if not runs or sum(runs) % rows or any(run % (sum(runs) // rows) for run in runs):
        return None, "image"
    return [run * rows // sum(runs) for run in runs], "tile"


def _runs(mask) -> list[int]:
    """Returns the lengths of the runs of True in the rows of a mask `(batch, tokens)`."""
    padded = nn.functional.pad(mask.int(), (1, 1))
    steps = padded.diff(dim=1)
    starts, ends = (steps == 1).nonzero()[:, 1], (steps == -1).nonzero()[:, 1]
    return (ends - starts).tolist()


def _find_thumbnail(views):
    """Returns the place of the tile that shows both halves of the probe's picture; None if none does."""

    def shows_both(view):
        left, right = view.picture.chunk(2, dim=2)
        return bool(right.mean() - left.mean() > 0.5 * (view.picture.amax() - view.picture.amin()) > 0)

    whole = [shows_both(view) for view in views]
    if sum(whole) != 1:
        return None
    return 0 if whole[0] else -1 if whole[-1] else None


@contextmanager
def _quiet(model):
    """Evaluation mode while the context lasts, so that nothing is drawn; then each module's own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _cast(inputs, tower) -> dict:
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


def _image_token_id(config):
    for name in ("image_token_id", "image_token_index"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return None


def _pooled_width(outputs) -> int:
    pooled = outputs.get(("pooler_output",))
    return pooled.shape[-1] if pooled is not None and pooled.dim() == 2 else 0


def _tokens_last(tensor):
    """Returns tokens `(..., tokens, dim)` of what may be a map `(images, dim, height, width)`."""
    return tensor.flatten(2).transpose(1, 2) if tensor.dim() == 4 else tensor


def _field(output, name):
    """Returns a field of a tower's output, or of its tensors by path; None without one."""
    if isinstance(output, dict) and (name,) in output:
        return output[(name,)]
    return getattr(output, name, None)


def _at(output, path):
    if isinstance(output, dict) and path in output:
        return output[path]
    for key in path:
        output = output[key]
    return output


def _mapped(output, function, path=()):
    """Applies `(path, tensor) -> tensor` to each tensor within an output; containers of transformers in place."""
    if isinstance(output, torch.Tensor):
        return function(path, output)
    if isinstance(output, dict):
        for key in list(output.keys()):
            output[key] = _mapped(output[key], function, (*path, key))
        return output
    if isinstance(output, list | tuple):
        return type(output)(_mapped(value, function, (*path, index)) for index, value in enumerate(output))
    return output


def _replaced(output, path, function):
    """Returns an output in which the tensor at `path` is replaced by `function` of it."""
    if not path:
        return function(output)
    key, rest = path[0], path[1:]
    if isinstance(output, tuple):
        return tuple(_replaced(value, rest, function) if index == key else value for index, value in enumerate(output))
    output[key] = _replaced(output[key], rest, function)
    return output
