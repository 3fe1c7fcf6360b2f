"""The table of supported models in the docs is what the tests here have found."""

from pathlib import Path

import pytest
from transformers import __version__
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from .outcomes import BROKEN, REFUSED, UNBUILT, WITHOUT_TOWER
from .test_contract import TRAINED, measured

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
LAYOUTS = {
    "Grid": "one picture or tile a row",
    "Packed": "packed patches (`grid_thw`)",
    "Pixtral": "padded pictures (`image_sizes`)",
    "PaddedPatches": "padded patches (`spatial_shapes`)",
    "PositionedPatches": "padded patches (`pixel_position_ids`)",
    "Strip": "a strip of patches (`target_sizes`)",
    "AttendingTiles": "tiles that attend to each other (`aspect_ratio_ids`)",
}
BEGIN, END = "<!-- begin of the generated table -->", "<!-- end of the generated table -->"


def table() -> str:
    """The rows of all classes in transformers' mapping for images and text."""
    lines = ["| `model_type` | class | tower | layout | the language model reads |", "|---|---|---|---|---|"]
    reasons = {
        **{name: f"refused: {why}" for name, (_, why) in REFUSED.items()},
        **dict.fromkeys(BROKEN, "not tried: transformers itself cannot run it with a picture"),
        **{name: f"no tower: {why}" for name, why in WITHOUT_TOWER.items()},
        **{name: why if why.startswith("refused") else f"not tried: {why}" for name, why in UNBUILT.items()},
    }
    mapping = sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items())
    for name, model_class in mapping:
        if name in TRAINED:
            _, eyes = measured(name)
            read = ", ".join(sorted({f"`{path[0]}`" for path in eyes.reading.paths}))
            tiles = ", cut into tiles" if eyes.tiles else ""
            layout = LAYOUTS[type(eyes.layout).__name__] + tiles
            lines.append(f"| {name} | {model_class} | {type(eyes.tower).__name__} | {layout} | {read} |")
    others = [f"| {name} | {model_class} | {reasons[name]} |" for name, model_class in mapping if name in reasons]
    towers = sum(name not in WITHOUT_TOWER for name, _ in mapping)
    trained = sum(name in TRAINED for name, _ in mapping)
    tried = (
        f"Tried with transformers {__version__}: of its {len(mapping)} classes for images and text {towers} have a "
        f"vision tower, and {trained} of these train."
    )
    heads = ["The others:", "", "| `model_type` | class | result |", "|---|---|---|"]
    return "\n".join([tried, "", *lines, "", *heads, *others, ""])


@pytest.mark.slow
def test_the_docs_show_the_table_as_it_is_measured():
    """Regenerate it by `python -m tests.families.test_table`."""
    text = PAGE.read_text(encoding="utf-8")
    shown = text.split(BEGIN)[1].split(END)[0].strip()
    if f"transformers {__version__}:" not in shown:
        pytest.skip(f"the table was made with another release than {__version__}")
    assert shown == table().strip()


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{head}{BEGIN}\n{table()}{END}{tail}", encoding="utf-8")
