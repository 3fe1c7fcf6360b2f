"""Settings of the feedback: small dataclasses, each of which checks its own."""

from dataclasses import fields

import pytest

from deem_plugin.feedback import ConditionConfig, DiffusionModelConfig, FeedbackConfig, ObjectiveConfig, RossConfig

PARTS = [FeedbackConfig, RossConfig, DiffusionModelConfig, ConditionConfig, ObjectiveConfig]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, "`weight` must be a finite number, zero or positive, got -1.0"),
        (
            {"condition": "cls"},
            r"must be a ConditionConfig, got 'cls': write `condition=ConditionConfig\(",
        ),
        ({"image_mean": [0.5, 0.5, 0.5]}, "both `image_mean` and `image_std`"),
    ],
)
def test_wrong_settings_are_refused_with_the_value(settings, message):
    with pytest.raises(ValueError, match=message):
        FeedbackConfig(**settings)


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        (ObjectiveConfig, {"timestep_sampling": "uniforn"}, "must be one of shrink, uniform.*got 'uniforn'"),
        (ConditionConfig, {"resampler_dim": 10, "resampler_heads": 3}, "multiple of `resampler_heads`"),
        (DiffusionModelConfig, {"dtype": "float8"}, "`dtype` must be one of float32, bfloat16, float16, got 'float8'"),
        (DiffusionModelConfig, {"image_size": 0}, "`image_size` must be at least 1, got 0"),
    ],
)
def test_each_part_checks_its_own_settings(part, settings, message):
    with pytest.raises(ValueError, match=message):
        part(**settings)


@pytest.mark.parametrize(
    "part",
    [FeedbackConfig, RossConfig, DiffusionModelConfig, ConditionConfig, ObjectiveConfig],
    ids=lambda p: p.__name__,
)
def test_no_part_has_more_than_fifteen_fields_and_each_says_what_it_is(part):
    assert len(fields(part)) <= 15
    assert all(item.name in part.__doc__ for item in fields(part))
