"""The benchmark of answering: every option gives plain's answers, and says how fast."""

import json

import pytest

from benchmarks.answers import OPTIONS, QUESTION_SETS, main, questions_about, run_eval_bench


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
    assert "| POPE, 6 a picture | batches of 8, shared image features |" in text
    assert (tmp_path / "bench.png").stat().st_size > 5000


def test_shared_features_are_computed_once_a_picture(monkeypatch):
    from deem_plugin.evaluation.feature_cache import FeatureCache

    kept = []
    monkeypatch.setattr(FeatureCache, "_keep", lambda self, key, block: kept.append(key))

    run_eval_bench(config="tiny", pairs=1, device="cpu", options=["batches of 8, shared image features"], questions=6)

    # Three pictures twice asked, one picture six times; a batch asks for each picture once, in two runs of each set.
    assert len(kept) == 2 * (3 + 1)


def test_questions_of_a_picture_differ_in_length():
    docs = questions_about(2, 3, 8)
    assert len({len(doc["question"]) for doc in docs[:3]}) == 3
    assert docs[0]["image"].tobytes() == docs[2]["image"].tobytes() != docs[3]["image"].tobytes()


def test_unknown_names_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="no config 'huge'; choose from tiny, mid"):
        run_eval_bench(config="huge")
    with pytest.raises(ValueError, match="no option 'faster'; choose from shared image features, "):
        run_eval_bench(config="tiny", options=["faster"])
