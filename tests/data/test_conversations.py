import json

import pytest
from datasets import Dataset, Features, Image, List, Value

from deem_plugin.data import conversations
from deem_plugin.data.conversations import iter_json_array, load_conversations

from ..tiny import tiny_image


@pytest.fixture
def folder(tmp_path):
    """A folder with two pictures."""
    (tmp_path / "images").mkdir()
    for index in range(2):
        tiny_image(index).save(tmp_path / "images" / f"{index}.png")
    return tmp_path


def llava_records():
    """One record of each form that LLaVA's files have."""
    return [
        {
            "id": "a",
            "image": "0.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "Noise é 🙂."},
            ],
        },
        {
            "id": 7,
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
            ],
        },
        {
            "id": "c",
            "image": ["0.png", "1.png"],
            "conversations": [
                {"from": "human", "value": "<image><image> Same?"},
                {"from": "gpt", "value": "No"},
            ],
        },
    ]


def load(path, folder, **kwargs):
    return load_conversations(path, cache_dir=folder / "cache", **kwargs)


def write(folder, records, name="data.json"):
    text = "\n".join(map(json.dumps, records)) if name.endswith("l") else json.dumps(records, indent=1)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_llava_files_become_messages_and_paths(folder, name):
    data = load(write(folder, llava_records(), name), folder, image_dir=folder / "images")

    assert data.column_names == ["messages", "images"]
    assert data[0]["messages"] == [
        {"role": "user", "content": "<image>\nWhat is it?"},
        {"role": "assistant", "content": "Noise é 🙂."},
    ]
    assert data[1]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert data[1]["images"] == []
    assert data[2]["images"] == [str(folder / "images" / "0.png"), str(folder / "images" / "1.png")]
    assert data.cache_files  # memory-mapped, not held in memory


def test_chat_lines_with_content_parts_become_marks(folder):
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    record = {
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "It"}],
        "images": ["images/1.png"],
    }

    data = load(write(folder, [record], "chat.jsonl"), folder)

    assert data[0]["messages"][0]["content"] == "<image>\nWhat?"
    assert data[0]["images"] == [str(folder / "images" / "1.png")]


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(folder):
    path = write(folder, llava_records()[1:2])
    first = load(path, folder)
    again = load(path, folder)
    write(folder, llava_records()[1:2] * 2)

    assert first.cache_files == again.cache_files
    assert len(load(path, folder)) == 2


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_streaming_an_array_gives_what_json_gives_whatever_the_chunk(folder, monkeypatch, chunk):
    monkeypatch.setattr(conversations, "_CHUNK", chunk)
    path = write(folder, llava_records())

    assert list(iter_json_array(path)) == llava_records()


def test_streaming_an_empty_array_gives_nothing(folder):
    assert list(iter_json_array(write(folder, []))) == []


@pytest.mark.parametrize("cut", [3, 40, -1])
def test_a_cut_off_array_is_an_error(folder, cut):
    path = write(folder, llava_records())
    path.write_text(path.read_text()[:cut])

    with pytest.raises(ValueError, match="cut off"):
        list(iter_json_array(path))


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("parts", [True, False])
def test_hugging_face_data_sets_load_with_pictures_stored_or_named(folder, stored, parts):
    mark = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}] if parts else "<image>\nWhat?"
    said = [{"type": "text", "text": "It"}] if parts else "It"
    rows = {
        "messages": [[{"role": "user", "content": mark}, {"role": "assistant", "content": said}]] * 2,
        "images": [["0.png"], ["1.png"]],
    }
    if stored:
        rows["images"] = [[{"path": None, "bytes": (folder / "images" / f"{i}.png").read_bytes()}] for i in range(2)]
    table = Dataset.from_dict(rows)
    if stored:
        table = table.cast_column("images", List(Image()))
    table.save_to_disk(folder / "saved")
    table.to_parquet(folder / "table.parquet")

    for path in (folder / "saved", folder / "table.parquet"):
        data = load(path, folder, image_dir=folder / "images")
        assert [m["content"] for m in data[1]["messages"]] == ["<image>\nWhat?", "It"]
        if stored:
            assert data.features["images"] == List(Image(decode=False))
            assert data[1]["images"][0]["bytes"] == rows["images"][1][0]["bytes"]
        else:
            assert data[1]["images"] == [str(folder / "images" / "1.png")]


def test_a_text_only_data_set_has_no_images(folder):
    features = Features({"messages": List({"role": Value("string"), "content": Value("string")})})
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    Dataset.from_dict({"messages": [turns]}, features=features).save_to_disk(folder / "saved")

    assert load(folder / "saved", folder)[0] == {"messages": turns, "images": []}


def broken(change):
    """A LLaVA record with an image after `change` has been at it, behind a sound one."""
    records = llava_records()
    change(records[2])
    return records


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(image="0.png"), r"record 2 .* has 2 <image> mark\(s\), but the record brings 1 image"),
        (lambda r: r.update(image=["0.png"] * 3), r"record 2 .* has 2 <image> .* brings 3 image.*Add the marks"),
        (lambda r: r.update(conversations=[]), r"conversation in record 2 .* is empty"),
        (lambda r: r["conversations"].pop(), r"record 2 .* has no answer"),
        (lambda r: r["conversations"][0].update({"from": "dog"}), r"Unknown speaker 'dog' in record 2 .*human, gpt"),
        (lambda r: r["conversations"][0].update(value=3), r"record 2 .* has the content 3"),
        (lambda r: r.pop("conversations"), r"record 2 .* has the keys \['id', 'image'\]"),
    ],
)
def test_a_wrong_record_is_named_with_its_number_and_the_remedy(folder, change, message):
    with pytest.raises(ValueError, match=message):
        load(write(folder, broken(change)), folder, image_dir=folder / "images")


def test_a_missing_image_folder_is_an_error(folder):
    with pytest.raises(ValueError, match=r"nowhere does not exist. Set `data.image_dir`"):
        load(write(folder, llava_records()), folder, image_dir=folder / "nowhere")


def test_a_wrong_image_folder_is_told_at_the_first_picture(folder):
    with pytest.raises(ValueError, match=r"0.png of record 0 .* does not exist. Set `data.image_dir`"):
        load(write(folder, llava_records()), folder, image_dir=folder)


def test_too_many_marks_in_a_hugging_face_data_set_are_an_error(folder):
    turns = [{"role": "user", "content": "<image><image>?"}, {"role": "assistant", "content": "It"}]
    Dataset.from_dict({"messages": [turns], "images": [["0.png"]]}).save_to_disk(folder / "saved")

    with pytest.raises(ValueError, match=r"record 0 .* has 2 <image> mark\(s\), but the record brings 1 image"):
        load(folder / "saved", folder)


@pytest.mark.parametrize("name", ["nothing.json", "nothing.parquet", "/nowhere/at/all"])
def test_missing_data_is_an_error_that_lists_the_forms(folder, name):
    with pytest.raises(ValueError, match="There is no data set at .*Set `data.path`"):
        load(folder / name, folder)


def test_missing_columns_are_an_error_that_lists_those_that_are_there(folder):
    Dataset.from_dict({"text": ["a"]}).save_to_disk(folder / "saved")

    with pytest.raises(ValueError, match=r"has the columns \['text'\]; expected `messages`"):
        load(folder / "saved", folder)
