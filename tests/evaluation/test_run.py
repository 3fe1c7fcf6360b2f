"""The runner: what lmms-eval hides behind exit code 0 is an error here; and the whole way, offline, from a shell."""

import json
import os
import subprocess
import sys
from ast import literal_eval

import pytest

from deem_plugin.evaluation import run
from deem_plugin.evaluation.mmvp import import_mmvp
from deem_plugin.evaluation.pope import import_pope
from deem_plugin.evaluation.robustvqa import SPLITS
from deem_plugin.evaluation.run import EvaluationError, evaluate

from ..tiny import tiny_llava
from .helpers import evaluated, offline_env, write_all_questions, write_mmvp_files, write_pope_files

FAILED_QUIETLY = """
Traceback (most recent call last):
KeyError: 'test'
2026 ERROR - Error during evaluation: 'test'. Please set `--verbosity=DEBUG` to get more information.
""".splitlines()
FAILED_AFTER_RETRIES = """
ConnectionError: Couldn't reach 'lmms-lab-encoder/POPE' on the Hub (OfflineModeIsEnabled)
tenacity.RetryError: RetryError[<Future at 0x7f state=finished raised ConnectionError>]
2026 ERROR - Error during evaluation: RetryError[<Future>]. Please set `--verbosity=DEBUG` to get more information.
""".splitlines()


def write_results(folder, results):
    """Returns a stand-in for the lmms-eval process that writes a results file as lmms-eval does."""

    def stream(command, env):
        assert command[command.index("--output_path") + 1] == str(folder)
        (folder / "model").mkdir(exist_ok=True)
        (folder / "model" / "20260101_000000_results.json").write_text(json.dumps(results))
        return 0, ["all is well"]

    return stream


def test_a_run_without_results_fails_with_the_reason_although_the_exit_code_is_zero(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_stream", lambda command, env: (0, FAILED_QUIETLY))

    with pytest.raises(EvaluationError, match=r"failed on robustvqa \(exit code 0\):\nKeyError: 'test'$"):
        evaluate("checkpoint", ["--tasks", "robustvqa", "--output_path", str(tmp_path)])


def test_the_cause_behind_a_retry_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_stream", lambda command, env: (0, FAILED_AFTER_RETRIES))

    with pytest.raises(EvaluationError, match="Couldn't reach 'lmms-lab-encoder/POPE'"):
        evaluate("checkpoint", ["--tasks", "pope", "--output_path", str(tmp_path)])


def test_a_crash_shows_the_last_lines_without_progress_bars(tmp_path, monkeypatch):
    log = ["\x1b[31mloading\x1b[0m", "Answering:  50%|█████     | 4/8", "Killed"]
    monkeypatch.setattr(run, "_stream", lambda command, env: (137, log))

    with pytest.raises(EvaluationError, match=r"\(exit code 137\):\nloading\nKilled$"):
        evaluate("checkpoint", ["--tasks", "robustvqa", "--output_path", str(tmp_path)])


def test_a_task_without_results_is_named(tmp_path, monkeypatch):
    results = {
        "results": {"pope": {"alias": "pope", "pope_accuracy,none": 0.5}, "robustvqa_a": {"robustvqa_f1_stderr": 1.0}},
        "group_subtasks": {"pope": [], "robustvqa": ["robustvqa_a"]},
    }
    monkeypatch.setattr(run, "_stream", write_results(tmp_path, results))
    with pytest.raises(EvaluationError, match="no results for robustvqa:"):
        evaluate("checkpoint", ["--tasks", "pope,robustvqa", "--output_path", str(tmp_path)])

    results["results"]["robustvqa_a"]["robustvqa_f1,none"] = 1.0
    (tmp_path / "model" / "20260101_000000_results.json").unlink()
    assert evaluate("checkpoint", ["--tasks", "pope, robustvqa", "--output_path", str(tmp_path)]) == results


def test_results_of_an_earlier_run_are_not_taken_for_those_of_this_one(tmp_path, monkeypatch):
    write_results(tmp_path, {"results": {"pope": {"pope_accuracy,none": 1.0}}})(
        [None, "--output_path", str(tmp_path)], {}
    )
    monkeypatch.setattr(run, "_stream", lambda command, env: (0, ["nothing happened"]))

    with pytest.raises(EvaluationError, match="nothing happened"):
        evaluate("checkpoint", ["--tasks", "pope", "--output_path", str(tmp_path)])


def test_bad_arguments_are_refused_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EvaluationError, match="Cannot write to the output folder .*file/out"):
        evaluate("checkpoint", ["--tasks", "pope", "--output_path", str(tmp_path / "file" / "out")])
    with pytest.raises(EvaluationError, match="No task was given"):
        evaluate("checkpoint", ["--tasks", " , ", "--output_path", str(tmp_path)])
    with pytest.raises(EvaluationError, match="takes no comma"):
        evaluate("a,b")


def test_output_is_passed_on_and_kept(capfd):
    code, log = run._stream(
        [sys.executable, "-c", "import os; print('one'); print(os.environ['WORD'], end=''); exit(3)"],
        {**os.environ, "WORD": "zwei"},
    )

    assert (code, log) == (3, ["one", "zwei"])
    assert capfd.readouterr().err == "one\nzwei"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A checkpoint, all question data, and the environment of an offline process that finds them."""
    folder = tmp_path_factory.mktemp("workplace")
    tiny_llava(folder / "llava")
    pope = write_pope_files(folder / "pope")
    import_pope(pope, pope / "images", folder / "hf" / "datasets")
    import_mmvp(write_mmvp_files(folder / "mmvp"), folder / "hf" / "datasets")
    write_all_questions(folder / "home")
    env = {**offline_env(folder), "DEEM_HOME": str(folder / "home")}
    for name in ("DEEM_ROBUSTVQA", "DEEM_DETAILS", "LMMS_EVAL_DATASETS_CACHE", "HF_DATASETS_CACHE"):
        env.pop(name, None)
    return folder, env


BENCHMARKS = "pope,pope_adv,pope_pop,pope_random,robustvqa,mmvp"
POPE_SPLITS = ("random", "popular", "adversarial")
OUR_VARIANTS = "robustvqa_reworded,robustvqa_choice,robustvqa_paper,deem_details,deem_pope," + ",".join(
    f"deem_pope_{split}" for split in POPE_SPLITS
)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["deem", "dummy"])
def test_every_task_runs_offline_by_name_alone_with_any_model(workplace, model):
    folder, env = workplace
    tasks, out = f"{BENCHMARKS},{OUR_VARIANTS}", folder / model
    model_args = {"pretrained": folder / "llava"} if model == "deem" else {"response": "yes"}

    results = evaluated(model_args, tasks, out, batch_size=4, model=model, env=env)

    groups = ("robustvqa", "robustvqa_reworded", "robustvqa_choice", "robustvqa_paper")
    single = set(tasks.split(",")) - set(groups) | {f"{group}_{split}" for group in groups for split in SPLITS}
    samples = {path.name.split("_samples_")[1] for path in out.rglob("*_samples_*.jsonl")}
    assert samples == {f"{task}.jsonl" for task in single}
    assert results["n-samples"]["robustvqa_a"]["effective"] == 6
    assert results["n-samples"]["mmvp"]["effective"] == 300
    assert results["n-samples"]["deem_pope"]["effective"] == 3 * results["n-samples"]["deem_pope_random"]["effective"]
    assert set(results["results"]["deem_details"]["deem_details_by_category,none"]) == {"left", "big"}
    log = next(out.rglob("*_samples_robustvqa_r.jsonl")).read_text().splitlines()
    assert [json.loads(line)["robustvqa_accuracy"]["question_id"] for line in log][:2] == ["r-0-yes", "r-0-no"]
    protocol = results["configs"]["robustvqa_paper_a"]["generation_kwargs"]
    assert (protocol["num_beams"], protocol["max_new_tokens"], protocol["length_penalty"]) == (3, 10, 0.0)
    if model == "dummy":
        # Always yes: right for one question of two, and told by the ratio of the answers, not of the labels.
        for task in ("robustvqa_v2", "robustvqa_reworded_v2", "deem_pope", "deem_pope_adversarial"):
            name = "robustvqa" if "robustvqa" in task else "deem_pope"
            scores = results["results"][task]
            assert (scores[f"{name}_accuracy,none"], scores[f"{name}_yes_ratio,none"]) == (0.5, 1.0), task
            assert scores[f"{name}_unknown_rate,none"] == 0.0 and f"{name}_auc,none" not in scores
        assert results["results"]["pope"]["pope_yes_ratio,none"] == 0.5  # lmms-eval's own counts the labels
        assert results["results"]["robustvqa_choice_a"]["robustvqa_choice_unknown_rate,none"] == 1.0


@pytest.mark.slow
def test_likelihoods_are_scored_by_the_tasks_that_ask_for_them(workplace):
    """The AUC is that of the margins in the log, and those are differences of the log's own likelihoods."""
    folder, env = workplace
    tasks = {"robustvqa_loglikelihood_a": "robustvqa", "deem_pope_loglikelihood_random": "deem_pope"}

    results = evaluated(
        {"pretrained": folder / "llava"},
        ",".join(tasks),
        folder / "margins",
        batch_size=4,
        env=env,
        more=["--force_simple"],
    )["results"]

    for task, name in tasks.items():
        log = next((folder / "margins").rglob(f"*_samples_{task}.jsonl")).read_text().splitlines()
        lines = list(map(json.loads, log))
        rows = [line[f"{name}_auc"] for line in lines]
        for line, row in zip(lines, rows, strict=True):
            yes, no = (literal_eval(result)[0] for result in line["filtered_resps"])
            assert row["margin"] == pytest.approx(no - yes) and yes > 0  # costs
            assert row["prediction"] == ("yes" if yes < no else "no")
        assert len({row["margin"] for row in rows}) > 1
        yes, no = ([row["margin"] for row in rows if row["target"] == target] for target in ("yes", "no"))
        expected = sum((y > n) + (y == n) / 2 for y in yes for n in no) / (len(yes) * len(no))
        assert results[task][f"{name}_auc,none"] == pytest.approx(expected)
        right = sum(row["prediction"] == row["target"] for row in rows)
        assert results[task][f"{name}_accuracy,none"] == pytest.approx(right / len(rows))


@pytest.mark.slow
def test_missing_data_fails_the_run_with_the_remedy(workplace, tmp_path):
    folder, env = workplace

    with pytest.raises(EvaluationError, match="Question file not found: .*robustvqa_.*Or point DEEM_ROBUSTVQA"):
        evaluated(
            {"pretrained": folder / "llava"},
            "robustvqa",
            tmp_path,
            batch_size=4,
            env={**env, "DEEM_ROBUSTVQA": str(tmp_path)},
        )


@pytest.mark.slow
def test_two_processes_give_the_rows_of_one(workplace):
    folder, env = workplace
    command = [
        "-m",
        "lmms_eval",
        "--model",
        "deem",
        "--model_args",
        f"pretrained={folder / 'llava'}",
        "--batch_size",
        "4",
    ]
    command += ["--tasks", "robustvqa,deem_details", "--log_samples", "--force_simple"]
    launchers = {
        "one": [sys.executable],
        "two": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    }
    rows = {}
    for name, launcher in launchers.items():
        done = subprocess.run(
            [*launcher, *command, "--output_path", str(folder / name)],
            env={**env, "ACCELERATE_USE_CPU": "true"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        results = next(folder.glob(f"{name}/*/*_results.json"))
        files = sorted(folder.glob(f"{name}/*/*_samples_*.jsonl"), key=lambda path: path.name.split("_samples_")[1])
        # The logs list the rows of one rank after those of the other.
        logs = [
            sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["doc_id"]) for path in files
        ]
        rows[name] = [json.loads(results.read_text())["results"], logs]
        assert ("Running on rank 1" in done.stdout + done.stderr) == (name == "two")

    assert rows["one"] == rows["two"]
    assert [len(log) for log in rows["one"][1]] == [8, 6, 6, 6]
