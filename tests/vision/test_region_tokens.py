"""Tokens of a region against their definition, and how the queries come to read them."""

import pytest
import torch

from deem_plugin.vision import DeemVisionConfig
from deem_plugin.vision.grids import positioned_maps
from deem_plugin.vision.region_tokens import RegionTokens

from .towers import tiny_tower

OPTIONS = {"num_queries": 5, "resampler_hidden_size": 24, "resampler_num_layers": 1, "resampler_num_heads": 2}


def test_a_token_is_the_mean_over_the_cells_that_the_region_touches():
    torch.manual_seed(0)
    tokens = RegionTokens(8)
    maps = [torch.randn(2, 8, 4, 4), torch.randn(2, 8, 2, 2)]
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, 0, :2, :4] = 1  # the first two cells of the finer map, half of the first cell of the coarser one
    mask[1] = 1

    out = tokens(maps, mask)

    assert out.shape == (2, 3, 8)
    torch.testing.assert_close(out[0, 0], tokens.features(maps[0][0, :, 0, :2].mean(1)))
    torch.testing.assert_close(out[0, 1], tokens.features(maps[1][0, :, 0, 0]))
    torch.testing.assert_close(out[1, 1], tokens.features(maps[1][1].flatten(1).mean(1)))
    assert not torch.equal(out[0, 2], out[1, 2])  # another shape
    with pytest.raises(ValueError, match="1 of 2 region masks are empty"):
        tokens(maps, torch.cat([mask[:1], torch.zeros(1, 1, 8, 8)]))


def test_queries_read_the_tokens_before_the_patches_and_a_whole_picture_is_a_region_too():
    tower = tiny_tower(multiscale=True, region_tokens=True, **OPTIONS).eval()
    pixels = torch.randn(2, 3, 64, 64)
    read = []
    tower.resampler.register_forward_pre_hook(lambda module, args: read.append(args[0]))

    whole = tower(pixels).last_hidden_state
    ones = tower(pixels, region_masks=torch.ones(2, 1, 64, 64)).last_hidden_state

    assert torch.equal(whole, ones)
    expected = tower.region_tokens(positioned_maps(tower.encoder(pixels).maps), torch.ones(2, 1, 64, 64))
    torch.testing.assert_close(read[0][:, :5], expected)
    assert read[0].shape[1] == 5 + 1 + 16


def test_they_need_maps_and_queries():
    with pytest.raises(ValueError, match="set `multiscale=True` and `num_queries` above 0 .now False and 77"):
        DeemVisionConfig(region_tokens=True, num_queries=77)
