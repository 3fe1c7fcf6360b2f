"""Files of records: what is no valid JSON is an error, wherever it stands."""

import json
import pickle

import pytest

from deem_plugin.data.tables import BrokenSample, Files, iter_json_array, iter_json_lines

RECORDS = [{"id": 1, "text": "Noise é 🙂.", "box": [0.5, 1e3]}, {"id": None, "turns": [{"a": {}}, []]}, 3]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_is_read_as_json_reads_it(tmp_path, indent, mark):
    path = tmp_path / "a.json"
    path.write_bytes(mark + json.dumps(RECORDS, indent=indent).encode())

    assert list(iter_json_array(path)) == RECORDS


def test_an_empty_array_holds_nothing(tmp_path):
    (tmp_path / "a.json").write_text(" []\n")

    assert list(iter_json_array(tmp_path / "a.json")) == []


@pytest.mark.parametrize(
    "text",
    ['[{"a":1}][{"b":2}]', '[{"a":1}{"b":2}]', '[,{"a":1}]', '[{"a":1},,{"a":2}]', '[{"a":1}] garbage {', '[{"a":1}',
     '[{"a":1},', '[{"a', "[NaN]"],
)  # fmt: skip
def test_what_is_no_array_or_more_than_one_is_an_error(tmp_path, text):
    (tmp_path / "a.json").write_text(text)

    with pytest.raises(ValueError, match="a.json is no valid JSON behind its first [012] records .*: it is broken"):
        list(iter_json_array(tmp_path / "a.json"))


@pytest.mark.parametrize("text", [b"", b" \n", b'{"a": 1}', b"\xef\xbb\xbf{}"])
def test_what_does_not_begin_as_an_array_is_told_so(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text)

    with pytest.raises(ValueError, match="a.json is not a JSON array of records.*`.jsonl`"):
        list(iter_json_array(tmp_path / "a.json"))


def test_text_in_another_encoding_is_told_by_its_file(tmp_path):
    (tmp_path / "a.json").write_bytes('["é"]'.encode("latin-1"))
    (tmp_path / "a.jsonl").write_bytes('{}\n\n"é"'.encode("latin-1"))

    with pytest.raises(ValueError, match="a.json is no valid JSON .*UTF8"):
        list(iter_json_array(tmp_path / "a.json"))
    with pytest.raises(ValueError, match="Line 3 of .*a.jsonl is no valid JSON: 'utf-8'"):
        list(iter_json_lines(tmp_path / "a.jsonl"))


def test_a_line_nested_too_deep_to_be_read_is_an_error_that_names_it(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n" + "[" * 100_000)

    with pytest.raises(ValueError, match="Line 2 of .*a.jsonl is no valid JSON"):
        list(iter_json_lines(tmp_path / "a.jsonl"))


def test_files_are_found_by_one_look_at_each_folder(tmp_path, monkeypatch):
    (tmp_path / "a.png").touch()
    files = Files()
    monkeypatch.setattr("os.path.isfile", lambda path: False)

    assert str(tmp_path / "a.png") in files and str(tmp_path / "b.png") not in files
    assert str(tmp_path / "none" / "a.png") not in files


def test_what_is_wrong_travels_from_a_worker():
    error = pickle.loads(pickle.dumps(BrokenSample("short", "a long message")))

    assert (error.reason, str(error)) == ("short", "a long message")
