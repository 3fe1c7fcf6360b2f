import pytest
from transformers.trainer_utils import get_last_checkpoint

from deem_plugin.training.checkpoint import (
    check_writable,
    last_complete_checkpoint,
    save_in_one_piece,
    set_aside_incomplete,
)


@pytest.fixture
def run_folder(tmp_path):
    """A run whose newest checkpoint was cut off: it has weights, but not the state that is written last."""
    for step, complete in ((9, True), (10, True), (20, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_text("weights")
        if complete:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    return tmp_path


def test_output_that_cannot_be_written_is_an_error_that_says_so(tmp_path):
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(ValueError, match=r"file/out cannot be written .*Set `training.output_dir`"):
        check_writable(tmp_path / "file" / "out")


def test_the_check_leaves_an_empty_folder(tmp_path):
    check_writable(tmp_path / "a" / "b")

    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_the_newest_checkpoint_is_the_newest_complete_one(run_folder, tmp_path):
    assert last_complete_checkpoint(run_folder).name == "checkpoint-10"
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


def test_a_half_written_checkpoint_is_set_aside(run_folder):
    set_aside_incomplete(run_folder)

    assert get_last_checkpoint(str(run_folder)).endswith("checkpoint-10")
    assert (run_folder / "incomplete-checkpoint-20" / "model.safetensors").is_file()


def write_into(folder):
    with open(f"{folder}/weights", "w") as file:
        file.write("new")


def test_a_save_replaces_the_earlier_one(tmp_path):
    for _ in range(2):
        save_in_one_piece(tmp_path / "final", write_into, True, lambda: None)

    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (tmp_path / "final" / "weights").read_text() == "new"


def test_a_failed_save_leaves_the_earlier_one_and_nothing_else(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "weights").write_text("old")

    def fail(folder):
        write_into(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_in_one_piece(tmp_path / "final", fail, True, lambda: None)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (tmp_path / "final" / "weights").read_text() == "old"
