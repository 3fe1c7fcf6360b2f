"""The benchmark of answering: every option gives plain's answers, and says how fast."""

import json
import tempfile

import pytest

from benchmarks.answers import OPTIONS, QUESTION_SETS, main, questions_about, run_eval_bench
from benchmarks.answers_model import save_model


def test_the_command_times_every_option_against_plain_answering(tmp_path, capsys):
    files = ["--json", str(tmp_path / "bench.json"), "--plot", str(tmp_path / "bench.png")]
    command = ["--config", "tiny", "--pairs", "1", "--questions", "6", "--device", "cpu"]

    main([*command, *files])

    bench = json.loads((tmp_path / "bench.json").read_text())
    rows = [(timing["questions"], timing["name"]) for timing in bench["timings"]]
    assert rows == [(questions, name) for questions in QUESTION_SETS for name in ("plain", *OPTIONS)]
    for timing in bench["timings"]:
        assert timing["ratio"] > 0 and timing["questions_per_second"] > 0 and timing["peak_bytes"] is None
        if "bfloat16" not in timing["name"]:
            assert timing["other_answers"] == 0
    text = capsys.readouterr().out
    assert "| POPE, 6 a picture | batches of 16, shared prefix |" in text
    assert (tmp_path / "bench.png").stat().st_size > 5000


def test_the_language_model_is_at_least_twenty_times_the_tower_where_the_name_says_so():
    from benchmarks.answers import _proportion

    with tempfile.TemporaryDirectory() as folder:
        save_model("llava", folder)
        assert 20 < _proportion(folder) < 40


def test_questions_of_a_picture_differ_in_length_and_the_short_ones_have_twenty_tokens():
    docs = questions_about(2, "POPE", 8)
    assert len({len(doc["question"]) for doc in docs[:6]}) > 3
    assert docs[0]["image"].tobytes() == docs[5]["image"].tobytes() != docs[6]["image"].tobytes()
    behind = [len(f"{doc['question']}\nassistant:") for doc in questions_about(1, "short", 8)]
    assert sum(behind) / len(behind) == pytest.approx(20, abs=2)


def test_unknown_names_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="no config 'huge'; choose from tiny, llava, llava-576, tower-heavy"):
        run_eval_bench(config="huge")
    with pytest.raises(ValueError, match="no option 'faster'; choose from shared prefix, "):
        run_eval_bench(config="tiny", options=["faster"])
