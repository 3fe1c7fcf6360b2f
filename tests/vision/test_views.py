import pytest
import torch

from deem_plugin.vision.views import View, bars, is_blank, sample_views


def views_of_two_images():
    """An image of four tiles and a thumbnail, and one of a single view; token i has the value i."""
    kinds = ["thumbnail", "tile", "tile", "tile", "tile", "image"]
    return [
        View(torch.full((1, 1), float(i)), torch.zeros(3, 2, 2), 0 if i < 5 else 1, kind)
        for i, kind in enumerate(kinds)
    ]


def test_each_image_weighs_alike_and_each_of_its_views():
    views = sample_views(views_of_two_images(), None)

    assert [view.weight for view in views] == [0.2] * 5 + [1.0]


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_a_sample_of_the_views_has_the_mean_of_all_in_expectation(limit):
    views = views_of_two_images()
    totals, counts = {0: 0.0, 1: 0.0}, []
    draws = 4000
    generator = torch.Generator().manual_seed(0)
    for _ in range(draws):
        sample = sample_views(views, limit, generator)
        counts.append(sum(view.image == 0 for view in sample))
        for view in sample:
            totals[view.image] += view.weight * view.tokens.item() / draws
        if limit > 1:
            assert any(view.kind == "thumbnail" for view in sample)

    assert set(counts) == {min(limit, 5)}
    # The mean of 0, 1, 2, 3, 4; the standard error of the mean of 4,000 draws is below 0.023.
    assert totals[0] == pytest.approx(2.0, abs=0.1) and totals[1] == pytest.approx(5.0)


@pytest.mark.parametrize("limit", [None, 2, 3, 5])
def test_an_image_in_two_calls_of_the_tower_weighs_as_much_as_any_other(limit):
    """The thumbnail in one, its four tiles in the other (DeepSeek-OCR 2)."""
    thumbnail = View(torch.zeros(1, 1), torch.zeros(3, 2, 2), 0, "thumbnail", elsewhere=4)
    tiles = [View(torch.zeros(1, 1), torch.zeros(3, 2, 2), 0, "tile", elsewhere=1) for _ in range(4)]
    generator = torch.Generator().manual_seed(0)

    calls = sample_views([thumbnail], limit, generator), sample_views(tiles, limit, generator)

    assert sum(len(views) for views in calls) == min(limit or 5, 5)
    assert sum(view.weight for views in calls for view in views) == pytest.approx(1.0)
    assert calls[0][0].weight == pytest.approx(0.2)


def test_bars_are_black_rows_and_columns_at_the_border():
    picture = torch.rand(3, 8, 8) * 0.5 + 0.3
    picture[:, :2] = 0
    picture[:, :, 7] = 0
    picture[:, 4] = 0  # within the picture it is content
    inside = bars(picture)

    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:, :7] = True
    assert torch.equal(inside, expected)


def test_a_picture_of_one_colour_is_blank():
    colour = torch.tensor([0.2, 0.5, 1.0]).view(3, 1, 1).expand(3, 4, 4)

    assert is_blank(colour) and is_blank(torch.ones(3, 4, 4))
    assert not is_blank(colour + torch.eye(4) * 0.01)
