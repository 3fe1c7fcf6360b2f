"""Scenes: what is drawn is what the attributes, captions and questions say."""

import math

import pytest
import torch

from deem_plugin.demo.scenes import (
    BACKGROUND_SHIFT,
    COLOR_NAMES,
    COLORS,
    MAX_OFFSET,
    RENDITIONS,
    SHAPES,
    TEXTURES,
    captions,
    detail_questions,
    render_scenes,
    sample_scenes,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_same_seed_gives_the_same_scenes_and_pictures():
    first, second = sample_scenes(20, generator()), sample_scenes(20, generator())
    pictures = [render_scenes(scenes, generator=generator(1)) for scenes in (first, second)]
    assert torch.equal(first.shape, second.shape)
    assert torch.equal(*pictures)


def test_full_correlation_ties_colors_and_texture_to_the_shape():
    scenes = sample_scenes(200, generator(), correlation=1.0)
    assert torch.equal(scenes.color, scenes.shape)
    assert torch.equal(scenes.texture, scenes.shape % len(TEXTURES))
    assert torch.equal(scenes.background, (scenes.shape + BACKGROUND_SHIFT) % len(COLORS))


def test_misleading_scenes_follow_another_shape():
    scenes = sample_scenes(200, generator(), correlation=1.0, misleading=True)
    assert (scenes.decoy != scenes.shape).all()
    assert torch.equal(scenes.color, scenes.decoy)


@pytest.mark.parametrize("correlation", [0.0, 0.75])
def test_share_of_following_colors_is_the_correlation_plus_chance(correlation):
    scenes = sample_scenes(4000, generator(), correlation=correlation)
    share = (scenes.color == scenes.shape).float().mean().item()
    assert share == pytest.approx(correlation + (1 - correlation) / len(COLORS), abs=0.03)


def test_correlation_outside_of_a_probability_is_refused():
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got 1.5"):
        sample_scenes(2, generator(), correlation=1.5)


@pytest.mark.parametrize("rendition", RENDITIONS)
@pytest.mark.parametrize("size", [16, 33])
def test_pictures_have_the_size_asked_for_and_lie_in_range(rendition, size):
    pictures = render_scenes(sample_scenes(9, generator()), size, rendition, generator())
    assert pictures.shape == (9, 3, size, size)
    assert pictures.min() >= 0
    assert pictures.max() <= 1


def test_unknown_rendition_lists_the_choices():
    with pytest.raises(ValueError, match="no rendition 'sepia'; choose one of photo, outline, grey, inverted"):
        render_scenes(sample_scenes(1, generator()), rendition="sepia")


def test_size_of_the_picture_does_not_change_the_scene():
    scenes = sample_scenes(30, generator())
    small, large = render_scenes(scenes, 16), render_scenes(scenes, 64)
    assert (small - torch.nn.functional.avg_pool2d(large, 4)).abs().mean() < 0.02


def test_object_has_its_color_and_is_where_its_attributes_say():
    scenes = sample_scenes(100, generator())
    scenes = scenes[torch.isin(scenes.shape, torch.tensor([SHAPES.index(name) for name in ("circle", "square")]))]
    pictures = render_scenes(scenes, 64)
    column = ((scenes.x + 1) * 32).long()
    row = ((scenes.y + 1) * 32).long()
    center = pictures[torch.arange(len(scenes)), :, row, column]
    torch.testing.assert_close(center, torch.tensor(list(COLORS.values()))[scenes.color], atol=0.01, rtol=0)


def test_inverted_rendition_is_the_negative_of_the_photo():
    scenes = sample_scenes(5, generator())
    torch.testing.assert_close(render_scenes(scenes, rendition="inverted"), 1 - render_scenes(scenes))


def test_caption_names_color_and_shape():
    scenes = sample_scenes(50, generator())
    for caption, color, shape in zip(captions(scenes), scenes.color, scenes.shape, strict=True):
        assert caption == f"a {COLOR_NAMES[color]} {SHAPES[shape]}"


def test_detail_questions_come_in_pairs_that_differ_in_the_last_word_and_tell_the_truth():
    scenes = sample_scenes(100, generator())
    for i, pairs in enumerate(detail_questions(scenes)):
        assert len(pairs) == 4
        for yes, no in pairs:
            assert yes.split()[:-1] == no.split()[:-1]
            assert yes != no
        assert pairs[0][0].endswith("left?" if scenes.x[i] < 0 else "right?")
        assert pairs[1][0].endswith("top?" if scenes.y[i] < 0 else "bottom?")
        assert pairs[2][0].endswith("big?" if scenes.scale[i] > 0.65 else "small?")
        assert pairs[3][0] == f"Is the background {TEXTURES[scenes.texture[i]]}?"


def test_attributes_stay_in_their_ranges():
    scenes = sample_scenes(500, generator())
    assert scenes.x.abs().max() <= MAX_OFFSET
    assert scenes.phase.max() < 2 * math.pi
    assert len(scenes) == 500
    assert len(scenes[:7]) == 7
