"""Deformable attention, against its definition written out point by point."""

import math

import pytest
import torch

from deem_plugin.vision.deformable import (
    DeformableAttention,
    image_features,
    relative_positions,
    sample_maps,
    softmax_with_null,
)


def test_images_are_numbered_from_the_latest_backwards():
    mask = torch.tensor([[True, True, True], [True, False, True], [False, False, False]])

    assert relative_positions(mask).tolist() == [[3, 2, 1], [2, 0, 1], [0, 0, 0]]


def test_the_null_entry_takes_what_low_scores_leave():
    scores = torch.tensor([[0.0, math.log(3)], [-torch.inf, -torch.inf]])

    weights, of_null = softmax_with_null(scores)

    torch.testing.assert_close(weights, torch.tensor([[0.2, 0.6], [0.0, 0.0]]))
    torch.testing.assert_close(of_null, torch.tensor([0.2, 1.0]))


def _bilinear(level, x, y):
    """Value of a map `(dim, height, width)` at fractions x and y of the picture; nothing outside."""
    height, width = level.shape[1:]
    column, row = x * width - 0.5, y * height - 0.5
    value = torch.zeros(level.shape[0])
    for r in (math.floor(row), math.floor(row) + 1):
        for c in (math.floor(column), math.floor(column) + 1):
            if 0 <= r < height and 0 <= c < width:
                value += (1 - abs(row - r)) * (1 - abs(column - c)) * level[:, r, c]
    return value


def test_samples_are_bilinear_and_nothing_lies_outside():
    torch.manual_seed(0)
    maps = [torch.randn(1, 2, 6, 3, 5), torch.randn(1, 2, 6, 2, 1)]  # two images, two heads of width 3
    images = image_features(maps, torch.ones(1, 2))
    points = torch.rand(1, 2, 4, 2, 3, 2) * 1.6 - 0.3  # some of them outside
    weights = torch.rand(1, 2, 4, 2, 2, 3)

    found = sample_maps(images.tokens.unflatten(-1, (2, 3)), images.sizes, points, weights)

    expected = torch.zeros(4, 2, 3)
    for image, query, head, point in torch.cartesian_prod(*map(torch.arange, (2, 4, 2, 3))).tolist():
        for level in range(2):
            values = maps[level][0, image, 3 * head : 3 * head + 3]
            at = _bilinear(values, *points[0, image, query, head, point].tolist())
            expected[query, head] += weights[0, image, query, head, level, point] * at
    torch.testing.assert_close(found[0], expected.flatten(1), atol=1e-5, rtol=1e-5)


def _attention(**options):
    torch.manual_seed(0)
    settings = {
        "num_heads": 2,
        "num_levels": 1,
        "num_points": 2,
        "max_images": 4,
        "offset_grid": 8,
        "offset_init": 1.0,
    }
    return DeformableAttention(6, 4, 8, **(settings | options))


def test_offsets_are_counted_in_cells_of_the_grid():
    """One point a quarter of the picture to the right of the upper left corner's cell, which has all the attention."""
    attention = _attention(num_heads=1, num_points=1, offset_grid=8)
    level = torch.arange(16.0).reshape(1, 1, 1, 4, 4).expand(-1, -1, 4, -1, -1)
    with torch.no_grad():
        attention.offsets.bias.copy_(torch.tensor([2.0, 0.0]))  # x, y in eighths
        attention.scores.bias.fill_(100.0)
        attention.value.weight.fill_(0.25)
        attention.out.weight.fill_(1 / 8)

    output = attention(torch.zeros(1, 1, 6), torch.full((1, 1, 2), 0.125), image_features([level], torch.ones(1, 1)))

    torch.testing.assert_close(output, torch.ones(1, 1, 6))  # of cells 0, 1, 2, ... the one beside the corner


@pytest.mark.parametrize(("offset_map", "same"), [(None, True), (4, False)])
def test_offsets_reach_equally_far_on_maps_of_any_size_unless_told(offset_map, same):
    attention = _attention(offset_map=offset_map)
    slope = torch.linspace(0.5 / 8, 1 - 0.5 / 8, 8)  # a ramp, the same at every resolution
    fine = slope.expand(1, 1, 4, 8, 8)
    coarse = slope.reshape(4, 2).mean(1).expand(1, 1, 4, 4, 4)
    queries, places = torch.randn(1, 3, 6), torch.full((1, 3, 2), 0.5)

    outputs = [attention(queries, places, image_features([level], torch.ones(1, 1))) for level in (fine, coarse)]

    assert torch.allclose(*outputs, atol=1e-5) == same


def test_points_are_not_rounded_to_the_precision_of_the_weights():
    attention = _attention(num_points=1).bfloat16()
    torch.nn.init.zeros_(attention.offsets.bias)
    level = (torch.arange(64.0) - 31.5).expand(1, 1, 4, 64, 64)
    places = torch.tensor([[[0.5, 0.5], [0.5 + 2**-9, 0.5]]])  # the second one rounds to the first one in bfloat16

    output = attention(torch.zeros(1, 2, 6).bfloat16(), places, image_features([level.bfloat16()], torch.ones(1, 1)))

    assert (output[0, 0] != output[0, 1]).any()


def test_the_mask_may_differ_from_query_to_query():
    attention = _attention()
    level = torch.randn(1, 2, 4, 5, 5)
    queries, places = torch.randn(1, 3, 6), torch.rand(1, 3, 2)
    mask = torch.tensor([[[1, 1], [1, 0], [0, 0]]])

    output = attention(queries, places, image_features([level], mask))

    for query in range(3):
        alone = attention(queries, places, image_features([level], mask[:, query]))
        torch.testing.assert_close(output[:, query], alone[:, query])
    torch.testing.assert_close(output[0, 2], attention.out.bias)


def test_who_sees_nothing_may_learn_what_that_means():
    attention = _attention(learn_null=True)
    torch.nn.init.normal_(attention.null_value)
    level = torch.randn(1, 2, 4, 5, 5)

    output = attention(torch.randn(1, 3, 6), torch.rand(1, 3, 2), image_features([level], torch.zeros(1, 2)))

    torch.testing.assert_close(output, attention.out(attention.null_value).expand(1, 3, -1))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="inner_dim=8 and num_heads=3"):
        _attention(num_heads=3)
