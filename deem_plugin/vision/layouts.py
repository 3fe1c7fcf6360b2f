"""
How a vision tower lays out the pictures of a call: six layouts, chosen by the names in the signature of its `forward`.

Each has two methods that are each other's inverse: `split` takes a call apart into views, `pack` makes the call of
pictures. Pictures are normalised as the tower gets them, on both sides. Nothing else knows how a tower lays out its
pictures.
"""

import copy
import inspect
import math
from abc import ABC, abstractmethod
from itertools import product

import torch
import torch.nn.functional as F
from torch import nn

from .patches import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    PATCH_AXES,
    PatchOrder,
    deal_out,
    grid_in,
    grid_positions,
    join_patches,
    pack_patches,
    token_positions,
    unpack_patches,
)
from .views import View


class Layout(ABC):
    """A tower's way to take pictures; its config gives the sizes of patches and merges."""

    # Whether rows of the output that are never read are the same in every picture (a class token, for example).
    fixed_rows = False
    # Whether a token's place must be told to whoever reads it: rotary positions leave none in its value.
    needs_positions = True
    # Whether what it shows as one picture may have letterbox bars.
    letterboxed = False

    def __init__(self, tower):
        config = getattr(tower, "config", None)
        self.names = signature_names(tower)
        self.pixels = "pixel_values" if "pixel_values" in self.names else self.names[0]
        self.patch = _one(getattr(config, "patch_size", None) or 1)
        self.config = config

    def candidates(self, inputs: dict, tokens: torch.Tensor) -> list["Layout"]:
        """
        Returns the layouts that a call with one picture might have, where its shapes alone do not tell: the one whose
        pictures are those that were shown is right. Arguments as of [`split`].
        """
        return [self]

    @abstractmethod
    def split(self, inputs: dict, tokens: torch.Tensor) -> list[View]:
        """
        Takes a call of the tower apart: its views in their order, pictures normalised as the tower got them.

        Args:
            inputs (`dict`): Arguments of the call, by name.
            tokens (`torch.Tensor`): What the language model reads of the output.

        Raises:
            ValueError: If pictures and tokens do not agree.
        """

    @abstractmethod
    def pack(self, pictures: list[torch.Tensor]) -> dict:
        """Makes the arguments of a call of pictures, each `(3, height, width)`, normalised."""


class Grid(Layout):
    """
    One picture a row, `(images, 3, height, width)`, or the patches of a square, `(images, patches, values)` (Molmo 2);
    with `patch_attention_mask` each picture fills a corner of its row.
    """

    needs_positions = False
    order = None  # of the values of patches, where these are what the tower gets

    def candidates(self, inputs, tokens):
        """As [`Layout.candidates`]: the orders of a patch's values where patches are what the tower gets."""
        if inputs[self.pixels].dim() != 3:
            return [self]
        return [_copy(self, order=PatchOrder(axes)) for axes in PATCH_AXES]

    @property
    def fixed_rows(self):
        """Not where a mask tells which tokens are padding."""
        return "patch_attention_mask" not in self.names

    def split(self, inputs, tokens):
        """As [`Layout.split`]; tokens `(images, tokens, dim)`, or those of all pictures in one row."""
        pixel_values = inputs[self.pixels].detach()
        if self.order is not None and pixel_values.dim() == 3:
            side = math.isqrt(pixel_values.shape[1])
            pixel_values = torch.stack(
                [join_patches(own, (side, side), self.patch, self.order) for own in pixel_values]
            )
        if pixel_values.dim() != 4 or pixel_values.shape[1] != 3:
            raise ValueError(
                f"The vision tower was called with `{self.pixels}` of shape {tuple(pixel_values.shape)}; the feedback "
                f"expects (images, 3, height, width)."
            )
        if tokens.dim() == 2 and len(tokens) % len(pixel_values) == 0:
            tokens = tokens.unflatten(0, (len(pixel_values), -1))
        if tokens.dim() != 3 or len(tokens) != len(pixel_values):
            raise ValueError(
                f"The vision tower gave tokens of shape {tuple(tokens.shape)} for {len(pixel_values)} pictures; the "
                f"feedback expects (images, tokens, dim)."
            )
        mask = inputs.get("patch_attention_mask")
        if mask is None:
            return _views(tokens, pixel_values)
        mask = mask.view(len(mask), -1, mask.shape[-1]).bool()
        sizes = torch.stack([mask.any(2).sum(1), mask.any(1).sum(1)], dim=1).tolist()
        height, width = (
            length // cells for length, cells in zip(pixel_values.shape[-2:], mask.shape[1:], strict=True)
        )
        if tokens.shape[1] == mask[0].numel():
            tokens = tokens.unflatten(1, mask.shape[1:])
            tokens = [own[:rows, :columns].flatten(0, 1) for own, (rows, columns) in zip(tokens, sizes, strict=True)]
        pairs = zip(pixel_values, sizes, strict=True)
        return _views(tokens, [own[:, : rows * height, : columns * width] for own, (rows, columns) in pairs])

    def pack(self, pictures):
        """As [`Layout.pack`]; all of one size."""
        if self.order is not None:
            pictures = [pack_patches(picture, self.patch, self.order) for picture in pictures]
        return {self.pixels: torch.stack(pictures)}


class Packed(Layout):
    """
    The patches of all pictures in one row and their grids beside them (the Qwen-VL family), `(patches, values)` or
    `(patches, 3, p, p)`; a batch dimension of 1 may stand before them.

    The order of the values is that of which the picture comes back that was shown. A tower may add tokens of its own
    to each row and to each picture (their ends); they belong to the picture.
    """

    def __init__(self, tower):
        super().__init__(tower)
        self.grid_name = next(name for name in self.names if name in PACKED_NAMES)
        # As measured: the order of a patch's values, None for the usual one, and tokens that the tower adds.
        self.order, self.row_ends, self.picture_ends = None, 0, 0
        # Shape of a patch's values and whether a batch dimension stands before, as in the last call, for `pack`.
        self.values = (3, self.patch, self.patch)
        self.batched = False

    @property
    def merge(self) -> int:
        """Side of the block of patches that becomes one token."""
        for name in ("spatial_merge_size", "merge_kernel_size", "merge_size"):
            if (value := getattr(self.config, name, None)) is not None:
                return _one(value)
        return 1

    def candidates(self, inputs, tokens):
        """As [`Layout.candidates`]: the usual order first."""
        self.values = tuple(_unbatched(inputs[self.pixels]).shape[1:])
        ((_, height, width),) = self._grids(inputs)
        rows, count = height // self.merge, tokens.flatten(0, -2).shape[0]
        surplus = count - rows * (width // self.merge)
        ends = (0, 0)
        if surplus > 0 and height * width % count and count % (height * width):
            ends = divmod(surplus, rows)
        usual = self._usual_order()
        axes = [usual.axes] if len(self.values) == 3 else PATCH_AXES
        merges = dict.fromkeys((usual.merge, 1, self.merge))
        orders = [PatchOrder(*own) for own in product(axes, merges)]
        return [_copy(self, order=order, row_ends=ends[0], picture_ends=ends[1]) for order in orders]

    def _usual_order(self):
        if len(self.values) == 3:
            return CHANNELS_FIRST if self.values[0] == 3 else CHANNELS_LAST
        return PatchOrder("ctyx", self.merge)

    def _grids(self, inputs):
        """Returns steps of time, rows and columns of each picture."""
        grids = torch.as_tensor(inputs[self.grid_name]).tolist()
        return [(1, *grid) if len(grid) == 2 else tuple(grid) for grid in grids]

    def _shares(self, inputs, grids, merges, tokens):
        """Returns what each picture's tokens are in proportion to, and whether a video has those of one frame."""
        sizes = list(zip(grids, merges, strict=True))
        if self.row_ends or self.picture_ends:
            return [t * (h // m) * (w // m + self.row_ends) + self.picture_ends for (t, h, w), m in sizes], False
        # With merges of its own for each picture, tokens are in proportion to the merged patches.
        own = inputs.get("merge_sizes") is not None
        shares = [t * h * w // (m * m if own else 1) for (t, h, w), m in sizes]
        # Kimi averages over time: a video has the tokens of one frame.
        still = _in_blocks(tokens) or sum(shares) % max(tokens.flatten(0, -2).shape[0], 1) > 0
        return [share // t for share, (t, _, _) in zip(shares, grids, strict=True)] if still else shares, still

    def split(self, inputs, tokens):
        """As [`Layout.split`]; tokens `(tokens, dim)`, `(1, tokens, dim)` or `(blocks, tokens of a block, dim)`."""
        patches = _unbatched(inputs[self.pixels].detach())
        self.values, self.batched = tuple(patches.shape[1:]), patches.dim() < inputs[self.pixels].dim()
        order = self.order or self._usual_order()
        grids = self._grids(inputs)
        merges = inputs.get("merge_sizes")
        merges = [self.merge] * len(grids) if merges is None else torch.as_tensor(merges).tolist()
        counts = [t * h * w for t, h, w in grids]
        if sum(counts) != len(patches):
            raise ValueError(
                f"The vision tower was given {len(patches)} patches for a `{self.grid_name}` of {grids}; the feedback "
                f"expects as many as its cells."
            )
        shares, still = self._shares(inputs, grids, merges, tokens)
        views = []
        pieces = deal_out(tokens, shares, f"`{self.grid_name}` {grids}"), patches.split(counts), grids, merges
        pieces = zip(*pieces, strict=True)
        for index, (own, packed, (t, h, w), merge) in enumerate(pieces):
            if still and t > 1:
                continue  # no frame has tokens of its own
            blocked = order if order.merge == 1 else PatchOrder(order.axes, merge)
            frames = unpack_patches(packed, (t, h, w), self._side, blocked)
            # Tokens of single patches follow each other as the patches do.
            token_merge = merge if _in_blocks(tokens) else blocked.merge
            places = self._positions(len(own) // t, h, w, merge, token_merge, own.device)
            for frame, picture in zip(own.chunk(t), frames, strict=True):
                views.append(View(frame, picture[0], index, "image" if t == 1 else "frame", places))
        return views

    @property
    def _side(self):
        """Side of a patch in pixels."""
        return self.values[1] if len(self.values) == 3 else self.patch

    def _positions(self, count, h, w, merge, token_merge, device):
        """Returns the positions of a picture's tokens; those that the tower adds stand at the ends of rows."""
        if self.row_ends or self.picture_ends:
            places = grid_positions(h // merge, w // merge + self.row_ends, device)
            before = self.picture_ends // 2
            return F.pad(places.T, (before, self.picture_ends - before)).T
        return token_positions(count, (h, w), device, token_merge)

    def pack(self, pictures):
        side = self._side
        depth = math.prod(self.values) // (3 * side * side)
        order = self.order or self._usual_order()
        patches = torch.cat([pack_patches(picture, side, order, depth) for picture in pictures])
        patches = patches.unflatten(1, self.values)
        patches = patches[None] if self.batched else patches
        sizes = [(1, *grid_in(picture, side)) for picture in pictures]
        if self.grid_name == "image_grid_hw":
            sizes = [size[1:] for size in sizes]
        inputs = {self.pixels: patches, self.grid_name: torch.tensor(sizes, device=patches.device)}
        if "merge_sizes" in self.names:
            inputs["merge_sizes"] = torch.tensor([self.merge] * len(pictures), device=patches.device)
        return inputs


class Pixtral(Layout):
    """Pictures of different sizes in the corner of a padded row each, `image_sizes` beside them; tokens in one row."""

    def split(self, inputs, tokens):
        """As [`Layout.split`]; tokens `(1, tokens of all pictures, dim)`."""
        pixel_values, sizes = inputs[self.pixels].detach(), inputs.get("image_sizes")
        if sizes is None:
            sizes = [pixel_values.shape[-2:]] * len(pixel_values)
        sizes = torch.as_tensor(sizes).tolist()
        grids = [(height // self.patch, width // self.patch) for height, width in sizes]
        pairs = zip(pixel_values, grids, strict=True)
        pictures = [own[:, : rows * self.patch, : columns * self.patch] for own, (rows, columns) in pairs]
        return _views(deal_out(tokens, [math.prod(grid) for grid in grids], f"`image_sizes` {sizes}"), pictures)

    def pack(self, pictures):
        sizes = [list(picture.shape[-2:]) for picture in pictures]
        height, width = (max(side) for side in zip(*sizes, strict=True))
        padded = [F.pad(p, (0, width - p.shape[2], 0, height - p.shape[1])) for p in pictures]
        return {self.pixels: torch.stack(padded), "image_sizes": torch.tensor(sizes)}


class PaddedPatches(Layout):
    """Patches in raster order, channels last, `(images, patches, 3 p^2)`, padded; `spatial_shapes` beside them."""

    sizes = "spatial_shapes"

    def split(self, inputs, tokens):
        """As [`Layout.split`]; tokens `(images, patches, dim)` padded alike, or those of all pictures in one row."""
        patches, grids = inputs[self.pixels].detach(), self._grids(inputs)
        pairs = zip(patches, grids, strict=True)
        pictures = [join_patches(own[: math.prod(grid)], grid, self.patch, CHANNELS_LAST) for own, grid in pairs]
        if tokens.dim() == 3 and tokens.shape[:2] == patches.shape[:2]:
            return _views([own[: math.prod(grid)] for own, grid in zip(tokens, grids, strict=True)], pictures)
        return _views(deal_out(tokens, [math.prod(grid) for grid in grids], f"`{self.sizes}` {grids}"), pictures)

    def _grids(self, inputs):
        return torch.as_tensor(inputs["spatial_shapes"]).tolist()

    def pack(self, pictures):
        grids = [grid_in(picture, self.patch) for picture in pictures]
        patches = [pack_patches(picture, self.patch, CHANNELS_LAST) for picture in pictures]
        packed = nn.utils.rnn.pad_sequence(patches, batch_first=True)
        return {self.pixels: packed, **self._places(grids, packed.shape[1], packed.device)}

    def _places(self, grids, longest, device):
        counts = torch.tensor([rows * columns for rows, columns in grids], device=device)
        mask = (torch.arange(longest, device=device) < counts[:, None]).long()
        places = {"spatial_shapes": torch.tensor(grids, device=device)}
        name = next((name for name in self.names if name in ("pixel_attention_mask", "attention_mask")), None)
        return places if name is None else {**places, name: mask}


class PositionedPatches(PaddedPatches):
    """As [`PaddedPatches`], with the column and row of each patch beside it, -1 for padding (Gemma 4)."""

    sizes = "pixel_position_ids"

    def _grids(self, inputs):
        columns_and_rows = (inputs["pixel_position_ids"].amax(dim=1) + 1).tolist()
        return [(rows, columns) for columns, rows in columns_and_rows]

    def _places(self, grids, longest, device):
        places = torch.full((len(grids), longest, 2), -1, device=device)
        for index, (rows, columns) in enumerate(grids):
            cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2)
            places[index, : rows * columns] = cells.flip(1).to(device)
        return {"pixel_position_ids": places}


class Strip(Layout):
    """The patches of all pictures side by side, `(1, 3, p, patches p)`; `target_sizes` beside them (MiniCPM-V)."""

    def split(self, inputs, tokens):
        """As [`Layout.split`]; tokens `(1, tokens of all pictures, dim)`."""
        grids = torch.as_tensor(inputs["target_sizes"]).tolist()
        patches = inputs[self.pixels][0].detach().unflatten(2, (-1, self.patch)).movedim(2, 0)
        pairs = zip(patches.split([rows * columns for rows, columns in grids]), grids, strict=True)
        pictures = [join_patches(own, grid, self.patch, CHANNELS_FIRST) for own, grid in pairs]
        return _views(deal_out(tokens, [math.prod(grid) for grid in grids], f"`target_sizes` {grids}"), pictures)

    def pack(self, pictures):
        patches = torch.cat([pack_patches(picture, self.patch, CHANNELS_FIRST) for picture in pictures])
        strip = patches.unflatten(1, (3, self.patch, self.patch)).movedim(0, 2).flatten(2)
        grids = torch.tensor([grid_in(picture, self.patch) for picture in pictures], device=strip.device)
        return {self.pixels: strip[None], "target_sizes": grids}


class AttendingTiles(Layout):
    """
    Tiles of an image that attend to each other, `(batch, images, tiles, 3, height, width)` (Llama 3.2 Vision): a view
    is a whole image, its tiles put together again.
    """

    letterboxed = True

    def split(self, inputs, tokens):
        """As [`Layout.split`]; tokens `(batch, images, tiles, tokens of a tile, dim)`."""
        pixel_values = inputs[self.pixels].detach()
        if tokens.dim() == 3:
            tokens = tokens.unflatten(0, pixel_values.shape[:2])
            tokens = tokens.unflatten(2, (pixel_values.shape[2], -1))
        views = []
        for row, ids in enumerate(inputs["aspect_ratio_ids"].tolist()):
            for place, ratio in enumerate(ids):
                if not ratio:  # padding
                    continue
                grid = self.config.supported_aspect_ratios[ratio - 1]
                tiles, own = (values[row, place, : math.prod(grid)] for values in (pixel_values, tokens))
                picture = join_patches(tiles, grid, tiles.shape[-1], CHANNELS_FIRST)
                views.append(View(own.flatten(0, 1), picture, len(views)))
        return views

    def pack(self, pictures):
        """As [`Layout.pack`]; pictures are whole tiles in one of the supported arrangements."""
        side, device = _one(self.config.image_size), pictures[0].device
        ratios = [tuple(ratio) for ratio in self.config.supported_aspect_ratios]
        grids = [grid_in(picture, side) for picture in pictures]
        most = max(map(math.prod, ratios))
        tiles = [pack_patches(picture, side, CHANNELS_FIRST).unflatten(1, (3, side, side)) for picture in pictures]
        tiles = [F.pad(own, (0, 0) * 3 + (0, most - len(own))) for own in tiles]
        counts = torch.tensor([[math.prod(grid)] for grid in grids], device=device)
        return {
            self.pixels: torch.stack(tiles)[:, None],
            "aspect_ratio_ids": torch.tensor([[ratios.index(grid) + 1] for grid in grids], device=device),
            "aspect_ratio_mask": (torch.arange(most, device=device) < counts[..., None]).long(),
        }


PACKED_NAMES = ("grid_thw", "image_grid_thw", "image_grid_hw")
# Names in a signature and the layout that they tell. `patch_attention_mask` is a crop within the grid.
LAYOUTS = {
    **dict.fromkeys(PACKED_NAMES, Packed),
    "pixel_position_ids": PositionedPatches,
    "spatial_shapes": PaddedPatches,
    "aspect_ratio_ids": AttendingTiles,
    "target_sizes": Strip,
    "image_sizes": Pixtral,
}


def signature_names(tower) -> list[str]:
    """Returns the names of the arguments of `forward` of a tower's class: frameworks wrap the instance's."""
    return list(inspect.signature(type(tower).forward).parameters)[1:]


def call_arguments(tower, args, kwargs) -> dict:
    """Returns the arguments of a call of `tower.forward` by name."""
    bound = dict(inspect.signature(type(tower).forward).bind(tower, *args, **kwargs).arguments)
    bound.pop(next(iter(bound)))
    return {**bound.pop("kwargs", {}), **bound}


def layout_of(tower) -> Layout:
    """Returns the layout of a tower; a signature that names none of the others' arguments is that of a grid."""
    names = signature_names(tower)
    for name, layout in LAYOUTS.items():
        if name in names:
            return layout(tower)
    return Grid(tower)


def _in_blocks(tokens) -> bool:
    """Whether tokens come in blocks, `(blocks, tokens of a block, dim)` (Kimi)."""
    return tokens.dim() == 3 and tokens.shape[0] > 1


def _unbatched(patches):
    """Takes a batch dimension of 1 off packed patches."""
    return patches.squeeze(0) if patches.dim() in (3, 5) else patches


def _views(pieces, pictures):
    """Returns the views of pictures and their tokens, which lie in a grid of the picture's proportions if they can."""
    views = []
    for index, (own, picture) in enumerate(zip(pieces, pictures, strict=True)):
        positions = token_positions(len(own), picture.shape[-2:], own.device)
        views.append(View(own, picture, index, positions=positions))
    return views


def _copy(layout, **measured):
    """Returns a layout like another, with attributes as they were measured."""
    layout = copy.copy(layout)
    vars(layout).update(measured)
    return layout


def _one(value) -> int:
    """Returns the side of a square given as a number or a pair."""
    return int(value[0]) if isinstance(value, list | tuple) else int(value)
