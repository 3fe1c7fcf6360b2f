import json

import pytest
from datasets import Dataset, Features, Image, List, Value

from deem_plugin.data.conversations import list_conversations
from deem_plugin.data.examples import Examples

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
    return list_conversations(path, **kwargs).read(cache_dir=folder / "cache")


def write(folder, records, name="data.json"):
    text = "\n".join(map(json.dumps, records)) if name.endswith("l") else json.dumps(records, indent=1)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_llava_files_become_messages_and_paths(folder, name):
    data = load(write(folder, llava_records(), name), folder, image_dir=folder / "images")

    assert data.column_names == ["messages", "images", "row"]
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


SAID = {
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It"}],
    "messages": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "It"}],
    "parts": [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It"}]},
    ],
    "plain": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "It"}],
}


@pytest.mark.parametrize("key", ["image", "images"])
@pytest.mark.parametrize("kind", [*SAID, "prompt"])
@pytest.mark.parametrize("stored", [True, False])
def test_texts_and_pictures_are_read_under_all_of_their_names(folder, kind, key, stored):
    """LLaVA's, LLaVA-OneVision's and TRL's columns, in a folder, in parquet and in lines; pictures stored or named."""
    said = SAID["messages" if kind == "prompt" else kind]
    name = {"conversations": "conversations"}.get(kind, "messages")
    rows = {"prompt": [said[:1]] * 2, "completion": [said[1:]] * 2} if kind == "prompt" else {name: [said] * 2}
    rows["extra"] = ["unread"] * 2
    pictures = ["0.png", "1.png"]
    if stored:
        pictures = [{"path": None, "bytes": (folder / "images" / name).read_bytes()} for name in pictures]
    rows[key] = [[picture] for picture in pictures] if key == "images" else pictures
    table = Dataset.from_dict(rows)
    if stored:
        table = table.cast_column(key, List(Image()) if key == "images" else Image())
    table.save_to_disk(folder / "saved")
    table.to_parquet(folder / "table.parquet")
    sources = [folder / "saved", folder / "table.parquet"]
    if not stored:
        sources.append(write(folder, [{name: rows[name][index] for name in rows} for index in range(2)], "data.jsonl"))

    for source in sources:
        listing = list_conversations(source, folder / "images")
        example = Examples.of([listing], cache_dir=folder / "cache")[1]
        assert [m["content"] for m in example["messages"]] == ["<image>\nWhat?", "It"]
        assert [image.tobytes() for image in example["images"]] == [tiny_image(1).tobytes()]


def test_a_text_only_data_set_has_no_images(folder):
    features = Features({"messages": List({"role": Value("string"), "content": Value("string")})})
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    Dataset.from_dict({"messages": [turns]}, features=features).save_to_disk(folder / "saved")

    assert load(folder / "saved", folder)[0] == {"messages": turns, "images": [], "row": 0}


def test_a_row_of_stored_pictures_may_have_none(folder):
    rows = {
        "conversations": [
            SAID["conversations"],
            [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
        ],
        "image": [{"path": None, "bytes": (folder / "images" / "0.png").read_bytes()}, None],
    }
    Dataset.from_dict(rows).cast_column("image", Image()).to_parquet(folder / "table.parquet")

    examples = Examples.of([list_conversations(folder / "table.parquet")], cache_dir=folder / "cache")

    assert [len(examples[index]["images"]) for index in range(2)] == [1, 0]


def test_what_is_said_before_the_first_question_is_left_out_and_counted(folder):
    records = llava_records()
    records[0]["conversations"].insert(0, {"from": "gpt", "value": "Welcome."})
    records[1]["conversations"].insert(1, {"from": "gpt", "value": "Welcome."})

    checked = list_conversations(write(folder, records), folder / "images").check(folder / "cache")

    assert checked.left_out == {"turn before the first question": 2} and not checked.problems
    roles = [[message["role"] for message in row["messages"]] for row in checked.whole]
    assert roles == [["user", "assistant"], ["system", "user", "assistant"], ["user", "assistant"]]


def test_all_that_is_wrong_is_listed_or_skipped_and_counted(folder):
    """Also pictures that are lost after the table was made."""
    records = llava_records() + [{"id": "d", "conversations": []}, "no record", {"messages": "text"}]
    path = write(folder, records)
    listing = list_conversations(path, folder / "images")
    listing.check(folder / "cache")
    (folder / "images" / "1.png").unlink()

    with pytest.raises(ValueError, match=r"(?s)4 of 6 samples.*record 3 .*record 4 .*record 5 .*1.png of record 2"):
        listing.read(cache_dir=folder / "cache")
    checked = listing.check(folder / "cache")
    assert len(listing.read("skip", folder / "cache")) == 2
    assert checked.left_out == {"without its picture": 1, "without answer": 1, "broken record": 2}
    tiny_image(1).save(folder / "images" / "1.png")
    assert len(listing.read("skip", folder / "cache")) == 3


def test_a_damaged_picture_is_refused_or_skipped(folder):
    (folder / "images" / "0.png").write_bytes((folder / "images" / "0.png").read_bytes()[:200])
    listing = list_conversations(write(folder, llava_records()), folder / "images")

    with pytest.raises(ValueError, match="0.png cannot be read"):
        Examples.of([listing], cache_dir=folder / "cache")[0]
    example = Examples.of([listing], "skip", folder / "cache")[0]
    assert example["messages"][0]["role"] == "system" and example["skipped"] == {"unreadable image": 1}


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
        (lambda r: r["conversations"][0].update({"from": "dog"}), r"record 2 .* unknown speaker 'dog'.*human, gpt"),
        (lambda r: r["conversations"][0].update(value=3), r"record 2 .* has the content 3"),
        (lambda r: r.pop("conversations"), r"record 2 .* has the keys \['id', 'image'\]"),
        (lambda r: r.update(messages=r["conversations"]), r"record 2 .* has the keys .*; expected `conversations`"),
        (lambda r: r.update(conversations=None), r"record 2 .* has the keys"),
        (lambda r: r.update(conversations="text"), r"record 2 .* a turn is 't'; expected an object"),
        (lambda r: r["conversations"].append("text"), r"record 2 .* a turn is 'text'; expected an object"),
        (lambda r: r["conversations"][0].update({"from": ["human"]}), r"record 2 .* unknown speaker \['human'\]"),
        (
            lambda r: r["conversations"][0].update(value=[{"type": "text"}]),
            r"record 2 .*a content part is .'type': 'text'",
        ),
        (
            lambda r: r["conversations"][0].update(value=[{"type": "audio"}]),
            r"record 2 .*a content part is .'type': 'au",
        ),
        (lambda r: r.update(image=5), r"record 2 .* its image is 5; expected a path"),
        (lambda r: r.update(image={"path": "0.png"}), r"record 2 .* its image is .'path'.*; expected a path"),
        (lambda r: r.update(images=["0.png"]), r"record 2 .* has `image` and `images`; give one of them"),
        (lambda r: r.update(video="a.mp4", image=None), r"record 2 .* brings video; only images are read"),
        (
            lambda r: r["conversations"].insert(0, r["conversations"][0]),
            r"record 2 .* two turns .*user, user, assistant",
        ),
        (
            lambda r: r["conversations"].append(r["conversations"][1]),
            r"record 2 .* two turns .*assistant, assistant",
        ),
    ],
)
def test_a_wrong_record_is_named_with_its_number_and_the_remedy(folder, change, message):
    with pytest.raises(ValueError, match=message):
        load(write(folder, broken(change)), folder, image_dir=folder / "images")


def test_a_missing_image_folder_is_an_error(folder):
    with pytest.raises(ValueError, match=r"nowhere does not exist. Set `data.image_dir`"):
        load(write(folder, llava_records()), folder, image_dir=folder / "nowhere")


def test_a_wrong_image_folder_is_told_by_the_pictures_that_are_missing(folder):
    with pytest.raises(ValueError, match=r"(?s)2 of 3 samples.*0.png of record 0 .* Set `data.image_dir`"):
        load(write(folder, llava_records()), folder, image_dir=folder)


def test_too_many_marks_in_a_hugging_face_data_set_are_an_error(folder):
    turns = [{"role": "user", "content": "<image><image>?"}, {"role": "assistant", "content": "It"}]
    Dataset.from_dict({"messages": [turns], "images": [["0.png"]]}).save_to_disk(folder / "saved")

    with pytest.raises(ValueError, match=r"record 0 .* has 2 <image> mark\(s\), but the record brings 1 image"):
        load(folder / "saved", folder, image_dir=folder / "images")


@pytest.mark.parametrize("name", ["nothing.json", "nothing.parquet", "/nowhere/at/all"])
def test_missing_data_is_an_error_that_lists_the_forms(folder, name):
    with pytest.raises(ValueError, match="There is no data set at .*Set `data.path`"):
        load(folder / name, folder)


def test_missing_columns_are_an_error_that_lists_those_that_are_there(folder):
    Dataset.from_dict({"text": ["a"]}).save_to_disk(folder / "saved")

    with pytest.raises(ValueError, match=r"has the columns \['text'\]; expected `messages`"):
        load(folder / "saved", folder)
