"""Nested dataclasses are made of dictionaries, laid over each other and written back."""

from dataclasses import dataclass, field

import pytest

from deem_plugin.settings import build_settings, changed_settings, merge_settings, nest


@dataclass
class Inner:
    size: int = 1
    name: str | None = None


@dataclass
class Outer:
    rate: float = 0.5
    inner: Inner = field(default_factory=lambda: Inner(size=3))
    rates: dict[str, float] = field(default_factory=dict)


def build(**values):
    return build_settings(Outer, values, "outer", "a test")


def test_a_part_is_made_on_top_of_its_default():
    assert build() == build(inner=None) == build(inner={}) == Outer()
    assert build(rate="1e-3", inner={"name": "x"}) == Outer(1e-3, Inner(3, "x"))
    assert build(inner=Inner(7)).inner.size == 7


def test_parts_are_merged_and_other_values_replaced():
    below = {"rate": 1.0, "inner": {"size": 4, "name": "a"}, "rates": {"x": 1.0}}

    assert merge_settings(Outer, below, {"inner": {"name": "b"}, "rates": {"y": 2.0}}) == {
        "rate": 1.0,
        "inner": {"size": 4, "name": "b"},
        "rates": {"y": 2.0},
    }
    assert below["inner"] == {"size": 4, "name": "a"}
    assert merge_settings(Outer, below, {"inner": None})["inner"] is None
    assert merge_settings(Outer, None, below) == below
    assert merge_settings(Outer, {"inner": "x"}, {"inner": {"size": 2}}) == {"inner": {"size": 2}}


def test_a_dotted_name_leads_into_parts_alone():
    assert nest(Outer, "inner.size", 2) == {"inner": {"size": 2}}
    assert nest(Outer, "rates.x", 2) == {"rates.x": 2}


def test_what_differs_from_the_defaults_makes_the_same_again():
    for settings in (Outer(), Outer(inner=Inner()), Outer(0.1, Inner(3, "x"), {"a": 1.0})):
        assert build(**changed_settings(settings)) == settings
    assert changed_settings(Outer(inner=Inner(3, "x"))) == {"inner": {"name": "x"}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"inner": {"sise": 1}},
            "Unknown key in `outer.inner` 'sise' in a test; did you mean 'size'. Choices: size, name",
        ),
        ({"sise": 1}, "Unknown key in `outer` 'sise' in a test; did you mean 'inner.size'"),
        ({"inner": {"size": "many"}}, "`outer.inner.size` must be of kind int, got 'many'"),
        ({"inner": 3}, "`outer.inner` must hold `key: value` lines with keys of size, name, got 3"),
    ],
)
def test_what_is_wrong_at_any_depth_is_named_with_the_choices(values, message):
    with pytest.raises(ValueError, match=message):
        build(**values)
