"""Each layout: `pack` and `split` are each other's inverse, and every token goes to its own picture."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from deem_plugin.vision.layouts import AttendingTiles, layout_of
from deem_plugin.vision.patches import PatchOrder, grid_positions


class GridTower(nn.Module):
    def forward(self, pixel_values):
        """One picture a row."""


class PackedTower(nn.Module):
    def forward(self, hidden_states, grid_thw, **kwargs):
        """The Qwen-VL family."""


class PixtralTower(nn.Module):
    def forward(self, pixel_values, image_sizes=None):
        """Pixtral, Mistral 3."""


class PaddedTower(nn.Module):
    def forward(self, pixel_values, pixel_attention_mask, spatial_shapes):
        """SigLIP 2, LFM2-VL."""


class PositionedTower(nn.Module):
    def forward(self, pixel_values, pixel_position_ids):
        """Gemma 4."""


class StripTower(nn.Module):
    def forward(self, pixel_values, target_sizes):
        """MiniCPM-V."""


class TilesTower(nn.Module):
    def forward(self, pixel_values, aspect_ratio_ids, aspect_ratio_mask):
        """Llama 3.2 Vision."""


MIXED = ((16, 24), (32, 16), (16, 16))
CASES = {
    "grid": (GridTower, ((16, 16),) * 3),
    "packed": (PackedTower, MIXED),
    "pixtral": (PixtralTower, MIXED),
    "padded patches": (PaddedTower, MIXED),
    "positioned patches": (PositionedTower, MIXED),
    "strip": (StripTower, MIXED),
    "attending tiles": (TilesTower, ((16, 32), (16, 16), (32, 16))),
}
PATCH = 4


def make(tower_class):
    tower = tower_class()
    ratios = [[1, 1], [1, 2], [2, 1]]
    tower.config = SimpleNamespace(patch_size=PATCH, image_size=16, supported_aspect_ratios=ratios)
    return layout_of(tower)


def cells_of(picture):
    """One token a patch, in raster order: the mean of its pixels, as a tower of one pooling layer would give."""
    return nn.functional.avg_pool2d(picture[None], PATCH)[0].flatten(1).T


@pytest.mark.parametrize("name", CASES)
def test_pictures_come_back_with_their_own_tokens(name):
    tower_class, sizes = CASES[name]
    layout = make(tower_class)
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.rand(3, *size, generator=generator) for size in sizes]

    inputs = layout.pack(pictures)
    own = [cells_of(picture) for picture in pictures]
    if name == "grid":
        tokens = torch.stack(own)
    elif name == "padded patches":
        tokens = nn.utils.rnn.pad_sequence(own, batch_first=True)
    elif name == "attending tiles":
        tiles = inputs["pixel_values"].flatten(0, 2)
        tokens = torch.stack([cells_of(tile) for tile in tiles]).view(3, 1, 2, 16, 3)
    else:
        tokens = torch.cat(own)
    views = layout.split(inputs, tokens)

    assert len(views) == 3 and [view.image for view in views] == [0, 1, 2]
    for view, picture, expected in zip(views, pictures, own, strict=True):
        assert torch.equal(view.picture, picture)
        if not isinstance(layout, AttendingTiles):
            assert torch.equal(view.tokens, expected)
            # The position of a token is the place of the patch that it is the mean of.
            rows, columns = (length // PATCH for length in picture.shape[1:])
            row, column = (view.positions * torch.tensor([rows, columns])).floor().long().unbind(1)
            assert torch.equal(row * columns + column, torch.arange(rows * columns))


@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("depth", [1, 2])
def test_packed_patches_in_blocks_are_put_together_again(merge, depth):
    """The order of the Qwen-VL processors: blocks of merged patches, each picture shown twice in time."""
    layout = make(PackedTower)
    layout.config.spatial_merge_size = merge
    layout.values = (3 * depth * PATCH**2,)
    pictures = [torch.rand(3, 16, 24), torch.rand(3, 8, 8)]

    inputs = layout.pack(pictures)

    assert inputs["hidden_states"].shape == (28, 3 * depth * PATCH**2)
    for tokens in (torch.arange(28.0)[:, None], torch.arange(28.0 / merge**2)[:, None]):
        views = layout.split(inputs, tokens)
        assert [len(view.tokens) for view in views] == [len(tokens) * 24 // 28, len(tokens) * 4 // 28]
        assert all(torch.equal(view.picture, picture) for view, picture in zip(views, pictures, strict=True))


def test_packed_patches_as_the_stock_image_processor_makes_them():
    """Oracle: transformers' own processor."""
    from PIL import Image
    from transformers import Qwen2VLImageProcessor

    processor = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 100)
    pixels = torch.randint(0, 256, (56, 84, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = processor([Image.fromarray(pixels.numpy())], return_tensors="pt")
    layout = make(PackedTower)
    layout.patch, layout.config.spatial_merge_size = 14, 2
    inputs = {"hidden_states": made["pixel_values"], "grid_thw": made["image_grid_thw"]}

    (view,) = layout.split(inputs, torch.zeros(6, 8))

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    assert (view.picture * std + mean - pixels.permute(2, 0, 1) / 255).abs().max() < 1e-6
    again = layout.pack([view.picture])
    assert torch.equal(again["hidden_states"], made["pixel_values"]) and torch.equal(
        again["grid_thw"], made["image_grid_thw"]
    )


@pytest.mark.parametrize("axes", ["ctyx", "tcyx", "yxct"])
@pytest.mark.parametrize("merge", [1, 2])
def test_the_order_of_packed_patches_is_one_of_the_candidates(axes, merge):
    layout = make(PackedTower)
    layout.config.spatial_merge_size = 2
    layout.values, layout.order = (3 * 2 * PATCH**2,), PatchOrder(axes, merge)
    picture = torch.rand(3, 16, 24)
    inputs = layout.pack([picture])
    fresh = make(PackedTower)
    fresh.config.spatial_merge_size = 2

    candidates = fresh.candidates(inputs, torch.zeros(6, 8))
    right = [own for own in candidates if torch.equal(own.split(inputs, torch.zeros(6, 8))[0].picture, picture)]

    assert [own.order for own in right] == [PatchOrder(axes, merge)]


def test_patches_of_whole_tokens_with_channels_last():
    """Inkling 2: each row is the patch of a token, `(tokens, P, P, 3)`, and the grid counts tokens."""
    layout = make(PackedTower)
    picture = torch.rand(3, 16, 24)
    patches = picture.unflatten(2, (3, 8)).unflatten(1, (2, 8)).permute(1, 3, 2, 4, 0).flatten(0, 1)
    inputs = {"hidden_states": patches, "grid_thw": torch.tensor([[1, 2, 3]])}

    (view,) = layout.split(inputs, torch.arange(6.0)[:, None])

    assert torch.equal(view.picture, picture) and view.tokens.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(layout.pack([view.picture])["hidden_states"], patches)


@pytest.mark.parametrize(("row_ends", "picture_ends"), [(1, 0), (1, 2)])
def test_tokens_that_end_rows_belong_to_their_picture(row_ends, picture_ends):
    """HunYuan-VL: a token behind each row of merged patches, and one before and behind the picture."""
    layout = make(PackedTower)
    layout.config.spatial_merge_size = 2

    def tokens_of(grids):
        counts = [h // 2 * (w // 2 + row_ends) + picture_ends for _, h, w in grids]
        return counts, torch.arange(float(sum(counts)))[None, :, None]

    (shown,) = [torch.rand(3, 32, 64)]
    one = layout.pack([shown])
    (layout, *_) = layout.candidates(one, tokens_of(one["grid_thw"].tolist())[1])
    inputs = layout.pack([torch.rand(3, 16, 24), torch.rand(3, 8, 32)])
    counts, tokens = tokens_of(inputs["grid_thw"].tolist())
    views = layout.split(inputs, tokens)

    assert (layout.row_ends, layout.picture_ends) == (row_ends, picture_ends)
    assert [len(view.tokens) for view in views] == counts == [len(view.positions) for view in views]


def test_a_video_is_a_frame_for_each_of_its_steps():
    layout = make(PackedTower)
    frames = torch.rand(3, 3, 8, 8)
    patches = torch.cat([layout.pack([frame])["hidden_states"].flatten(1) for frame in frames])
    inputs = {"hidden_states": patches, "grid_thw": torch.tensor([[3, 2, 2]])}

    views = layout.split(inputs, torch.arange(12.0)[:, None])

    assert [view.kind for view in views] == ["frame"] * 3 and {view.image for view in views} == {0}
    assert all(torch.equal(view.picture, frame) for view, frame in zip(views, frames, strict=True))


def test_a_patch_mask_crops_pictures_and_tokens():
    class MaskedTower(nn.Module):
        def forward(self, pixel_values, patch_attention_mask=None):
            """SmolVLM, Idefics."""

    layout = make(MaskedTower)
    pixels, mask = torch.rand(1, 3, 16, 16), torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[:, :3, :2] = True

    (view,) = layout.split({"pixel_values": pixels, "patch_attention_mask": mask}, torch.arange(16.0).view(1, 16, 1))

    assert torch.equal(view.picture, pixels[0, :, :12, :8])
    assert view.tokens.flatten().tolist() == [0, 1, 4, 5, 8, 9]


def test_patches_of_squares_are_put_together_in_one_of_the_candidates():
    """Molmo 2: `(crops, patches, values)`."""
    layout = make(GridTower)
    pictures = torch.rand(2, 3, 16, 16)
    cut = pictures.unflatten(3, (4, 4)).unflatten(2, (4, 4)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    inputs, tokens = {"pixel_values": cut}, torch.zeros(2, 16, 8)

    candidates = [own for own in layout.candidates(inputs, tokens) if own.order.axes == "yxct"]
    views = candidates[0].split(inputs, tokens)

    assert all(torch.equal(view.picture, picture) for view, picture in zip(views, pictures, strict=True))
    assert torch.equal(candidates[0].pack(list(pictures))["pixel_values"], cut)


@pytest.mark.parametrize("shape", [(2, 729, 588), (2, 1, 16, 16)])
def test_pixels_that_are_no_pictures_are_refused(shape):
    with pytest.raises(ValueError, match=r"expects \(images, 3, height, width\)"):
        make(GridTower).split({"pixel_values": torch.zeros(shape)}, torch.zeros(2, 4, 8))


def test_tokens_that_no_picture_has_are_refused():
    layout = make(PixtralTower)
    with pytest.raises(ValueError, match="31 tokens for 32 patches"):
        layout.split(layout.pack([torch.rand(3, 16, 16), torch.rand(3, 16, 16)]), torch.zeros(1, 31, 8))


def test_cells_are_numbered_row_by_row_or_by_blocks():
    rows = grid_positions(2, 4).tolist()

    assert rows[:2] == [[0.25, 0.125], [0.25, 0.375]] and rows[4] == [0.75, 0.125]
    assert grid_positions(2, 4, merge=2).tolist() == [rows[index] for index in (0, 1, 4, 5, 2, 3, 6, 7)]
