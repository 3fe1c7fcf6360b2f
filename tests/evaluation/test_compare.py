"""Comparing runs: the numbers by hand, flips by name, and refusal of what was not the same data."""

import json
import random

import pytest

from deem_plugin import cli
from deem_plugin.evaluation import compare_report, robustvqa
from deem_plugin.evaluation.compare import CompareError, compare_runs
from deem_plugin.evaluation.pope import import_pope
from deem_plugin.evaluation.questions import content_hash
from deem_plugin.evaluation.sample_logs import SampleLogError
from deem_plugin.evaluation.statistics import cluster_totals, estimate

from .helpers import evaluated, offline_env, robustvqa_rows, write_all_questions, write_pope_files
from .runs import DATE, mmvp_log, pope_log, robustvqa_log, write_run


def yes(index, row):
    return "Yes."


def right_but(*wrong):
    """Answers that are right but for some rows, where nothing is said."""
    return lambda index, row: "" if index in wrong else row["answer"]


def write_pair(folder, rows=None, wrong=(4,), **options):
    """Writes a run that says yes to everything, and one that is wrong in some rows only."""
    rows = rows or robustvqa_rows()
    runs = {"base": yes, "new": right_but(*wrong)}
    return [
        write_run(folder / name, {"robustvqa_a": robustvqa_log(rows, answers)}, model=name, **options)
        for name, answers in runs.items()
    ]


def test_numbers_are_those_counted_by_hand(tmp_path):
    """Three images with a yes and a no each: the base says yes to all, the new run all but row 4 (a yes) right."""
    result = compare_runs(*write_pair(tmp_path)).tasks[0]

    assert (result.task, result.metric, result.questions, result.images) == ("robustvqa_a", "robustvqa_accuracy", 6, 3)
    assert (result.base, result.new) == (0.5, 5 / 6)
    assert result.difference == estimate(cluster_totals([0, 1, 0, 1, -1, 1], list("aabbcc")))
    assert [flip.question for flip in result.gained] == ["a-0-no", "a-1-no", "a-2-no"]
    (lost,) = result.lost
    assert (lost.question, lost.target, lost.base_answer, lost.new_answer) == ("a-2-yes", "yes", "Yes.", "")
    assert lost.prompt == "Is tabby the main object in this image? Please anwser yes or no"
    assert result.p_value == pytest.approx(2 * (1 + 4) / 16)


def test_order_of_the_lines_does_not_matter(tmp_path):
    base, new = write_pair(tmp_path)
    expected = compare_runs(base, new).tasks[0]
    for seed, run in enumerate((base, new)):
        log = next(run.rglob("*.jsonl"))
        lines = log.read_text().splitlines()
        random.Random(seed).shuffle(lines)
        log.write_text("\n".join(lines))

    result = compare_runs(base, new).tasks[0]

    assert (result.difference, result.lost, result.gained) == (expected.difference, expected.lost, expected.gained)


def test_a_run_against_itself_differs_in_nothing(tmp_path):
    base, _ = write_pair(tmp_path)
    result = compare_runs(base, base).tasks[0]

    assert (result.difference.value, result.difference.low, result.difference.high) == (0, 0, 0)
    assert (result.lost, result.gained, result.p_value) == ([], [], 1.0)


def test_a_group_counts_its_tasks_alike(tmp_path):
    runs = []
    for name, answers in (("base", yes), ("new", right_but())):
        logs = {
            "robustvqa_a": robustvqa_log(robustvqa_rows("a", images=10), answers),
            "robustvqa_r": robustvqa_log(robustvqa_rows("r", images=2), yes),
        }
        known = {"robustvqa_a": {"metadata": {"data": "one"}}}
        groups = {"robustvqa": ["robustvqa_a", "robustvqa_r"]}
        runs.append(write_run(tmp_path / name, logs, known, groups))

    comparisons = compare_runs(*runs)

    group, pairs = comparisons.groups
    assert (group.metric, pairs.metric) == ("robustvqa_accuracy", "robustvqa_pair_acc")
    assert [result.task for result in comparisons.tasks] == ["robustvqa_a"] * 2 + ["robustvqa_r"] * 2
    assert (group.questions, group.images, len(group.gained)) == (24, 12, 10)
    assert group.difference.value == pytest.approx((0.5 + 0) / 2)
    assert (group.base, group.new, group.p_value) == (0.5, 0.75, None)
    assert comparisons.tasks[0].same_data and not group.same_data
    assert "| robustvqa (mean of 2) | robustvqa_pair_acc | 12 |" in compare_report.to_markdown(comparisons)
    other = write_run(tmp_path / "other", logs, groups={"robustvqa": ["robustvqa_a"]})
    assert compare_runs(other, runs[1]).groups == []  # what the name means there is another mean


def test_half_a_pair_does_not_count(tmp_path):
    """As a limit on the number of samples may leave one; here the one that the new run gets wrong."""
    pairs = compare_runs(*write_pair(tmp_path, rows=robustvqa_rows()[:5])).tasks[1]

    assert (pairs.metric, pairs.questions, pairs.new) == ("robustvqa_pair_acc", 2, 1.0)


def test_mmvp_is_compared_by_question_and_by_pair(tmp_path):
    """Three pairs, right with A and B: the base gets one pair, the new run all but the last question."""
    answers = {"base": "ABAAAA", "new": "ABABAA"}
    runs = [write_run(tmp_path / name, {"mmvp": mmvp_log(list(said))}) for name, said in answers.items()]

    questions, pairs = compare_runs(*runs).tasks

    assert (questions.metric, questions.questions, questions.base, questions.new) == ("mmvp_accuracy", 6, 4 / 6, 5 / 6)
    assert [flip.question for flip in questions.gained] == ["doc_id 3"] and not questions.lost
    assert (pairs.metric, pairs.questions, pairs.base, pairs.new) == ("mmvp_pair_accuracy", 3, 1 / 3, 2 / 3)
    [flip] = pairs.gained
    assert (flip.question, flip.target, flip.base_answer, flip.new_answer) == ("pair 1", "A / B", "A", "A / B")


def test_a_metric_between_0_and_1_is_compared_by_what_rose_and_fell(tmp_path):
    def lines(scores):
        head = {"target": "cat", "filtered_resps": "cats", "input": "What?"}
        return [{"doc_id": index, **head, "anls": score} for index, score in enumerate(scores)]

    runs = [
        write_run(tmp_path / name, {"docvqa": lines(scores)})
        for name, scores in (("base", [0.5, 0.0, 1.0, 0.25]), ("new", [0.75, 1.0, 1.0, 0.0]))
    ]
    (result,) = compare_runs(*runs).tasks

    assert result.difference.value == pytest.approx((0.25 + 1 + 0 - 0.25) / 4)
    assert (len(result.lost), len(result.gained), result.p_value) == (1, 2, 1.0)


def test_pope_whose_ids_are_not_unique_is_joined_by_place(tmp_path):
    """Its three sets number their questions alike, and its logs name no image."""
    questions = [(str(number), target) for _ in range(3) for number, target in ((1, "yes"), (2, "no"), (3, "yes"))]
    runs = [write_run(tmp_path / answer, {"pope": pope_log(questions, answer)}) for answer in ("yes", "no")]

    (result,) = compare_runs(*runs).tasks

    assert (result.metric, result.questions, result.images) == ("pope_accuracy", 9, None)
    assert (len(result.lost), len(result.gained)) == (6, 3)
    assert "taken for independent" in compare_report.to_markdown(compare_runs(*runs))


def test_images_of_an_imported_pope_are_found(tmp_path, monkeypatch):
    pope = write_pope_files(tmp_path / "pope", images=2)
    import_pope(pope, pope / "images", tmp_path / "cache")
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    questions = [(str(number), "no" if number % 2 else "yes") for _ in range(3) for number in (1, 2, 3, 4)]
    config = {"dataset_path": "lmms-lab-encoder/POPE", "test_split": "test", "metadata": [{"version": 0.0}]}
    runs = [
        write_run(tmp_path / answer, {"pope": pope_log(questions, answer)}, {"pope": config})
        for answer in ("yes", "no")
    ]

    (result,) = compare_runs(*runs).tasks

    assert result.images == 2
    assert result.documents.image(5).size == (32, 32)

    # Another POPE under the same name is not what these runs saw.
    other = write_pope_files(tmp_path / "other", images=1)
    import_pope(other, other / "images", tmp_path / "cache")
    assert compare_runs(*runs).tasks[0].images is None


def test_tasks_without_ids_are_joined_by_place(tmp_path):
    def lines(scores):
        return [
            {"doc_id": i, "target": "B", "filtered_resps": "A", "input": f"Which {i}?", "exact_match": score}
            for i, score in enumerate(scores)
        ]

    runs = [write_run(tmp_path / n, {"quiz": lines(s)}) for n, s in (("base", [1.0, 0.0]), ("new", [0.0, 0.0]))]
    (result,) = compare_runs(*runs).tasks

    assert (result.metric, result.lost[0].question, result.p_value) == ("exact_match", "doc_id 0", 1.0)


def test_rows_that_differ_are_named(tmp_path):
    rows = robustvqa_rows()
    base, _ = write_pair(tmp_path, rows)

    def new(name, rows):
        return write_run(tmp_path / name, {"robustvqa_a": robustvqa_log(rows, yes)})

    with pytest.raises(CompareError, match=r"different data of robustvqa_a(?s:.*)2 questions only in .*base.*a-2-yes"):
        compare_runs(base, new("fewer", rows[:4]))
    with pytest.raises(CompareError, match="1 question only in .*base.*: a-0-yes\n.*1 question only in .*other"):
        compare_runs(base, new("other", [{**rows[0], "question_id": "new"}, *rows[1:]]))
    with pytest.raises(CompareError, match="another prompt: a-1-no; the first has 'Is wall_clock .* in the base and "):
        compare_runs(base, new("asked", [*rows[:3], {**rows[3], "caption": "sundial"}, *rows[4:]]))
    with pytest.raises(CompareError, match="another target: a-0-no; the first has 'no' in the base and 'yes'"):
        compare_runs(base, new("label", [rows[0], {**rows[1], "answer": "yes"}, *rows[2:]]))
    with pytest.raises(CompareError, match="6 questions with another image_id: a-0-yes, .* and 1 more"):
        compare_runs(base, new("images", [{**row, "image_id": "x"} for row in rows]))


def test_other_images_are_seen_by_the_content_hash(tmp_path):
    def run(name, content):
        config = {"robustvqa_a": {"metadata": {"version": 1.0, "data": content}}}
        return write_run(tmp_path / name, {"robustvqa_a": robustvqa_log(robustvqa_rows(), yes)}, config)

    assert compare_runs(run("base", "one"), run("same", "one")).tasks[0].same_data
    assert not compare_runs(run("base", "one"), run("unknown", None)).tasks[0].same_data
    with pytest.raises(CompareError, match=r"content hashes \(one and two\), so that images differ"):
        compare_runs(run("base", "one"), run("other", "two"))


def test_runs_that_cannot_be_read_say_what_is_wrong(tmp_path):
    base, new = write_pair(tmp_path)
    with pytest.raises(SampleLogError, match="No such run directory: .*nowhere"):
        compare_runs(base, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        SampleLogError, match="empty holds no sample logs; expected .*`--log_samples --output_path DIR`"
    ):
        compare_runs(tmp_path / "empty", new)
    with pytest.raises(
        SampleLogError, match="logs of 2 models; expected those of one. Give one of .*base/base, .*new"
    ):
        compare_runs(base, tmp_path)

    log = next(new.rglob("*.jsonl"))
    whole = log.read_text()
    log.write_text(whole[: len(whole) * 2 // 3])
    with pytest.raises(SampleLogError, match=rf"{log}, line \d: expected a JSON object .* evaluate again"):
        compare_runs(base, new)
    log.write_text(whole + whole.splitlines()[2])
    with pytest.raises(SampleLogError, match="line 7: doc_id 2 comes once too often"):
        compare_runs(base, new)
    log.write_text("")
    with pytest.raises(SampleLogError, match="is empty"):
        compare_runs(base, new)
    results = next(base.rglob("*_results.json"))
    results.write_text(results.read_text()[:50])
    with pytest.raises(SampleLogError, match=f"{results} is no whole results file"):
        compare_runs(base, new)


def test_runs_without_a_task_or_score_in_common_are_refused(tmp_path):
    base, _ = write_pair(tmp_path)
    questions = [("1", "yes")]
    other = write_run(tmp_path / "other", {"pope": pope_log(questions, "yes")})
    with pytest.raises(CompareError, match="no task in common: .*base has robustvqa_a, .*other has pope"):
        compare_runs(base, other)
    line = {"doc_id": 0, "target": "?", "filtered_resps": "-", "input": "Rate it.", "rating": 3.5}
    rated = [write_run(tmp_path / name, {"rating": [line]}) for name in ("one", "two")]
    with pytest.raises(CompareError, match="None of the common tasks rating has a metric that is the mean of "):
        compare_runs(*rated)

    both = write_run(tmp_path / "both", {"pope": pope_log(questions, "yes"), "rating": [line]})
    third = write_run(tmp_path / "third", {"pope": pope_log(questions, "no"), "rating": [line]})
    comparisons = compare_runs(both, third)
    assert [result.task for result in comparisons.tasks] == ["pope"]
    assert comparisons.left_out == dict.fromkeys(
        ("pope, pope_precision", "pope, pope_recall", "rating, rating"), "no mean over questions or pairs"
    )


def test_the_newest_log_of_a_task_counts(tmp_path):
    base, new = write_pair(tmp_path)
    log = robustvqa_log(robustvqa_rows(), yes)
    write_run(new, {"robustvqa_a": log}, model="new", date="20260102_000000")

    comparisons = compare_runs(base, new)

    assert comparisons.new.dates == ["20260102_000000"] and comparisons.base.dates == [DATE]
    assert comparisons.tasks[0].new == 0.5


def test_the_command_writes_everything_with_images_where_the_data_is(tmp_path, capsys):
    rows = robustvqa_rows()
    path = robustvqa.write_robustvqa(rows, tmp_path / "robustvqa_a.parquet")
    config = {
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "metadata": {"data": content_hash(path)},
    }
    rows[0]["caption"] = "<b> | &"  # nothing of the data is taken for markup
    rows[4]["caption"] = "<i>"
    base, new = write_pair(tmp_path, rows, configs={"robustvqa_a": config})

    assert cli.main(["compare", str(base), str(new), "--html"]) == 0

    text = (new / "compare.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    assert "| robustvqa_a | robustvqa_accuracy | 6 | 3 | 0.500 | 0.833 | +0.333 [" in text
    assert "robustvqa_a, robustvqa_accuracy: better in the base (1)" in text
    assert (
        "| a-2-yes | Is <i> the main object in this image? Please anwser yes or no | yes | Yes. | (nothing) |" in text
    )
    assert "no content hash" not in text
    numbers = json.loads((new / "compare.json").read_text())
    assert numbers["tasks"]["robustvqa_a"]["robustvqa_accuracy"]["difference"]["value"] == pytest.approx(1 / 3)
    assert [flip["question"] for flip in numbers["tasks"]["robustvqa_a"]["robustvqa_accuracy"]["gained"]] == [
        "a-0-no",
        "a-1-no",
        "a-2-no",
    ]
    assert (new / "compare.png").stat().st_size > 1000
    page = (new / "compare.html").read_text()
    assert page.count("data:image/jpeg;base64") == 6 and "not found" not in page
    assert "Is &lt;i&gt; the main object" in page and "<i>" not in page

    # Without the data, the same but the images.
    path.unlink()
    assert cli.main(["compare", str(base), str(new), "--html", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "compare.html").read_text().count("<td>not found</td>") == 6


def test_long_lists_of_flips_are_cut_in_the_text_and_whole_in_the_numbers(tmp_path):
    base, new = write_pair(tmp_path, robustvqa_rows(images=25), wrong=())
    out = tmp_path / "out"
    text = compare_report.main(base, new, out).read_text()

    assert text.count("| Yes. | no |") == 20 and "5 more are in compare.json" in text
    assert (
        len(json.loads((out / "compare.json").read_text())["tasks"]["robustvqa_a"]["robustvqa_accuracy"]["gained"])
        == 25
    )
    assert not (out / "compare.html").exists()


def test_one_image_alone_has_no_interval(tmp_path):
    base, new = write_pair(tmp_path, robustvqa_rows(images=1), wrong=())
    text = compare_report.main(base, new).read_text()

    assert "+0.500 [one image only]" in text
    assert (
        json.loads((new / "compare.json").read_text())["tasks"]["robustvqa_a"]["robustvqa_accuracy"]["difference"][
            "low"
        ]
        is None
    )


def test_missing_matplotlib_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare_report, "find_spec", lambda name: None)

    assert cli.main(["compare", *map(str, write_pair(tmp_path))]) == 1
    assert "needs matplotlib, which is not installed: `pip install 'deem-plugin[demo]'`" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_of_lmms_eval_itself_are_compared(tmp_path):
    """Two runs of lmms-eval's own dummy model, told to say yes and no."""
    write_all_questions(tmp_path / "home")
    env = {**offline_env(tmp_path), "DEEM_HOME": str(tmp_path / "home")}
    for answer in ("yes", "no"):
        options = {"batch_size": 1, "model": "dummy", "env": env}
        evaluated({"response": answer}, "robustvqa,deem_details", tmp_path / answer, **options)

    comparisons = compare_runs(tmp_path / "yes", tmp_path / "no")

    kinds = ("accuracy", "pair_acc")
    expected = [f"deem_details_{kind}" for kind in kinds] + [f"robustvqa_{kind}" for _ in "arv" for kind in kinds]
    assert [result.metric for result in comparisons.tasks] == expected
    assert [group.task for group in comparisons.groups] == ["robustvqa"] * 2
    for result in comparisons.tasks:
        assert result.same_data and result.documents is not None
        half = 0 if "pair" in result.metric else result.questions // 2  # of no pair are both answers right
        assert len(result.lost) == len(result.gained) == half
        assert result.difference.value == 0.0 and result.p_value == 1.0


def scored(folder, metric, scores, reported, **results):
    """Writes a run of a task `t` whose one metric is a number."""
    lines = [
        {"doc_id": place % 4, "target": "x", "filtered_resps": "y", "input": "?", metric: score}
        for place, score in enumerate(scores)
    ]
    write_run(folder, {"t": lines})
    file = folder / "model" / f"{DATE}_results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"results": {"t": reported}} | results))
    return folder


def test_fewer_errors_are_better(tmp_path):
    known = {"higher_is_better": {"t": {"wer": False}}}
    base = scored(tmp_path / "base", "wer", [0.5, 0.5, 0.5, 0.1], {"wer,none": 0.4}, **known)
    new = scored(tmp_path / "new", "wer", [0.1, 0.3, 0.5, 0.3], {"wer,none": 0.3}, **known)

    result = compare_runs(base, new).tasks[0]

    assert result.difference.value == pytest.approx(-0.1)
    assert [[flip.doc_id for flip in flips] for flips in (result.lost, result.gained)] == [[3], [0, 1]]


def test_of_several_filters_the_first_counts(tmp_path):
    runs = [
        scored(tmp_path / name, "acc", [*strict, *flexible], {"acc,strict": sum(strict) / 4, "acc,flexible": 1.0})
        for name, strict, flexible in (("base", [0, 0, 0, 1], [1] * 4), ("new", [0, 0, 1, 1], [1] * 4))
    ]

    result = compare_runs(*runs).tasks[0]

    assert (result.questions, result.base, result.new) == (4, 0.25, 0.5)


def test_questions_without_scores_or_pairs_are_told(tmp_path):
    nan = float("nan")
    runs = [scored(tmp_path / name, "acc", [1, 1, nan, 1], {"acc,none": nan}) for name in ("base", "new")]
    with pytest.raises(CompareError, match="t, acc: no score of 1 of 4 questions or pairs"):
        compare_runs(*runs)

    runs = [scored(tmp_path / f"{name} pairs", "pair_acc", [0] * 4, {"pair_acc,none": 0.0}) for name in "ab"]
    with pytest.raises(CompareError, match="t, pair_acc: no mean over questions or pairs"):
        compare_runs(*runs)
