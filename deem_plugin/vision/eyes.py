"""The eyes of a vision-language model: its tower, the layout of its pictures, and what the language model reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from .layouts import Grid, Layout, call_arguments, layout_of
from .normalization import find_image_processor, normalization, normalize, unnormalize
from .outputs import field_of, has_values, replaced
from .probe import LOCAL_COUNTS, cast, difference_to_shown, see, show_picture
from .reading import Reading, parameters_of, pooled_width, reading_of
from .towers import find_tower, is_encoder, without_peft
from .views import View, bars

# Mean difference between the picture that is shown and the one that comes back: more than resizing makes.
_PICTURE_TOLERANCE = 0.06


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
        image_end_id (`int`, *optional*): Ends an image there, whose tiles may have tokens between them.
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
    image_end_id: int | None = None
    options: dict = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, processor=None, mean=None, std=None) -> "Eyes":
        """
        Measures a model.

        Args:
            model (`nn.Module`): A vision-language model, also behind PEFT, or a vision encoder alone.
            processor (*optional*): Its processor or image processor. Given a tokenizer or nothing, the image processor
                is looked for where the model came from.
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
        call = show_picture(base, tower, layout, image_processor)
        reading = reading_of(call, layout)
        tokens = reading.select(call.outputs)
        eyes = cls(
            tower=tower,
            layout=layout,
            reading=reading,
            width=tokens.shape[-1],
            mean=mean,
            std=std,
            read_parameters=parameters_of(tower, [call.outputs[path] for path in call.read]),
            pooled_width=pooled_width(call.outputs),
            image_token_id=_first_id(base.config, "image_token_id", "image_token_index"),
            image_end_id=_image_end_id(base.config, processor),
            options=call.options,
        )
        if has_values(tokens) and image_processor is not None:
            eyes.layout = _layout_of_shown(eyes, call, layout.candidates(call.inputs, tokens))
        views = eyes._split(call.inputs, call.outputs)
        if isinstance(layout, Grid) and not is_encoder(base) and len(views) > 1:
            eyes.tiles = True
            eyes.thumbnail = _find_thumbnail(views) if has_values(tokens) else None
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
            if model_inputs.get(LOCAL_COUNTS) is not None:
                views = _of_two_calls(views, inputs[self.layout.pixels], model_inputs)
            else:
                views = _grouped(self, views, model_inputs)
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
        Shows images to their model as its image processor makes them (`inputs`), without a text, and returns the
        views.
        """
        views = []

        def note(module, args, kwargs, output):
            views.extend(self.views(self.call_arguments(args, kwargs), output, inputs))

        handle = self.tower.register_forward_hook(note, with_kwargs=True)
        try:
            see(without_peft(model), self.tower, cast(inputs, self.tower))
        finally:
            handle.remove()
        return views

    def look(self, pictures: list[torch.Tensor]) -> list[View]:
        """
        Shows pictures `(3, height, width)` in [0, 1], of a size that the layout takes, to the tower itself, each one a
        view.
        """
        parameter = next(self.tower.parameters())
        normalized = [self.normalize(picture).to(parameter) for picture in pictures]
        inputs = {**self.options, **self.layout.pack(normalized)}
        # `forward`, not a call: hooks on the tower belong to the model's own calls.
        return self.views(inputs, self.tower.forward(**inputs))

    def inject(self, output, through: Callable):
        """Replaces, in a tower's output, each tensor that the language model reads by what `through` returns of it."""
        for path in self.reading.paths:
            output = replaced(output, path, through)
        return output

    def normalize(self, picture: torch.Tensor) -> torch.Tensor:
        """Pictures `(..., 3, height, width)` in [0, 1] to what the tower is shown, float32."""
        return normalize(picture, self.mean, self.std)

    def unnormalize(self, picture: torch.Tensor) -> torch.Tensor:
        """Undoes [`normalize`]. Not clamped."""
        return unnormalize(picture, self.mean, self.std)

    def _split(self, inputs, output):
        tokens = self.reading.select(output)
        views = self.layout.split(inputs, tokens)
        pooled, maps = field_of(output, "pooler_output"), field_of(output, "maps")
        if pooled is not None and pooled.dim() == 2 and len(pooled) == len(views):
            views = [replace(view, pooled=vector) for view, vector in zip(views, pooled, strict=True)]
        if maps is not None:
            views = [
                replace(view, maps={name: level[index] for name, level in maps.items()})
                for index, view in enumerate(views)
            ]
        return views


def _layout_of_shown(eyes, call, candidates):
    """Returns the layout by which the picture comes back that was shown; raises a `ValueError` if none does."""
    differences = []
    for layout in candidates:
        views = replace(eyes, layout=layout)._split(call.inputs, call.outputs)
        differences.append(max(difference_to_shown(eyes.unnormalize(view.picture)) for view in views))
    least = min(differences)
    # A grid has pictures of any cut, of which the right order comes closest.
    if least > _PICTURE_TOLERANCE and not isinstance(eyes.layout, Grid):
        raise ValueError(
            f"The pictures in a call of the vision tower ({type(eyes.tower).__name__}) cannot be put together: "
            f"the one that was shown comes back with a mean difference of {least:.2f} (of 1). Its patches are "
            f"laid out in an order that the feedback does not know."
        )
    return candidates[differences.index(least)]


def _grouped(eyes, views, model_inputs):
    """Tells which rows of a grid are tiles or frames of one image."""
    counts, kind = _rows_per_image(model_inputs, len(views), eyes)
    if counts is None:
        return views
    grouped = []
    for image, count in enumerate(counts):
        rows = views[len(grouped) : len(grouped) + count]
        kinds = [kind if count > 1 else "image"] * count
        if count > 1 and kind == "tile" and eyes.thumbnail is not None:
            kinds[eyes.thumbnail] = "thumbnail"
        grouped += [replace(view, image=image, kind=own) for view, own in zip(rows, kinds, strict=True)]
    return grouped


def _of_two_calls(views, shown, model_inputs):
    """Tells, in a call for thumbnails or for tiles, which image each row belongs to (DeepSeek-OCR 2)."""
    counts = torch.as_tensor(model_inputs[LOCAL_COUNTS]).tolist()
    tiles = model_inputs.get("pixel_values_local")
    if tiles is not None and shown.shape == tiles.shape and torch.equal(shown, tiles.to(shown)):
        images = [image for image, count in enumerate(counts) for _ in range(count)]
        return [
            replace(view, image=image, kind="tile", elsewhere=1) for view, image in zip(views, images, strict=True)
        ]
    return [
        replace(view, kind="thumbnail" if count else "image", elsewhere=count)
        for view, count in zip(views, counts, strict=True)
    ]


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
    lengths = _image_lengths(ids, eyes.image_token_id, eyes.image_end_id)
    if not lengths or sum(lengths) % rows or any(length % (sum(lengths) // rows) for length in lengths):
        return None, "image"
    return [length * rows // sum(lengths) for length in lengths], "tile"


def _image_lengths(ids, image, end) -> list[int]:
    """
    Returns the number of tokens of each image in texts `(batch, tokens)`: up to what ends an image, for there may be
    others between its tiles (Aya Vision, Llama 4); where nothing does, as many as follow each other.
    """
    mask = ids == image
    breaks = ids == end if end is not None else torch.zeros_like(mask)
    if not breaks.any():
        breaks = ~mask
    # The end of a row ends an image, too.
    numbers = nn.functional.pad(breaks.int(), (0, 1), value=1).flatten().cumsum(0).view(len(ids), -1)[:, :-1]
    return numbers[mask].unique_consecutive(return_counts=True)[1].tolist()


def _find_thumbnail(views):
    """Returns the place of the tile that shows both halves of the probe's picture; None if none does."""

    def shows_both(view):
        left, right = view.picture.chunk(2, dim=2)
        return bool(right.mean() - left.mean() > 0.5 * (view.picture.amax() - view.picture.amin()) > 0)

    whole = [shows_both(view) for view in views]
    if sum(whole) != 1:
        return None
    return 0 if whole[0] else -1 if whole[-1] else None


def _first_id(config, *names):
    """Returns the id of a token that a config has by one of these names; or None."""
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)


def _image_end_id(config, processor):
    """Returns the id of the token that ends an image in a text, as the processor or the config names it; or None."""
    tokenizer = getattr(processor, "tokenizer", None)
    for name in ("end_of_img_token", "image_end_token", "eoi_token"):
        token = getattr(processor, name, None) or getattr(tokenizer, name, None)
        if isinstance(token, str) and tokenizer is not None:
            return tokenizer.convert_tokens_to_ids(token)
    return _first_id(config, "eoi_token_id", "image_end_token_id")
