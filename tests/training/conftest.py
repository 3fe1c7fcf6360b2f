"""Tiny stand-ins for what recipes name."""

import json
from pathlib import Path

import pytest

from ..tiny import tiny_full_clip, tiny_image, tiny_llama, tiny_llava, tiny_sd_folder, tiny_text_encoder


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> Path:
    """A folder with tiny models, a diffusion model, pictures and conversations (every fourth with text only)."""
    folder = tmp_path_factory.mktemp("parts")
    tiny_llava(folder / "llava")
    tiny_llama(folder / "llama")
    tiny_full_clip(folder / "clip")
    tiny_text_encoder(tiny_sd_folder(folder / "sd"))
    (folder / "images").mkdir()
    records = []
    for index in range(16):
        tiny_image(index).save(folder / "images" / f"{index}.png")
        question = {"from": "human", "value": "<image>\nIs it noise?" if index % 4 else "Is noise noise?"}
        record = {"id": index, "conversations": [question, {"from": "gpt", "value": "yes" if index % 2 else "no"}]}
        if index % 4:
            record["image"] = f"{index}.png"
        records.append(record)
    (folder / "data.json").write_text(json.dumps(records))
    return folder
