"""Runs lmms-eval as its users do, and finds out whether it worked: it exits with 0 even when it failed."""

import argparse
import json
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deem_plugin.children import LAUNCHER, MODULE, child_command

_TAIL_LINES = 200  # kept of the log to explain a failure
_SHOWN_LINES = 12
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class EvaluationError(RuntimeError):
    """lmms-eval failed, whatever its exit code says."""


def evaluate(
    pretrained: str | Path,
    arguments: Sequence[str] = (),
    *,
    num_processes: int = 1,
    env: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """
    Evaluates a checkpoint with lmms-eval's model `deem`.

    Args:
        pretrained (`str` or `Path`): Checkpoint folder, hub id, or folder of a peft adapter.
        arguments (`Sequence[str]`, *optional*):
            Any arguments of lmms-eval. Where they are left out, `--tasks robustvqa,pope --batch_size 16
            --output_path out/eval`; `--model_args` go with the checkpoint. Below the folder of `--use_cache` each
            checkpoint with its data has one of its own, so that no answer is stale, see `fingerprint`.
        num_processes (`int`, *optional*, defaults to 1): Processes on this machine that share the questions.
        env (`Mapping[str, str]`, *optional*): Environment variables on top of this process's.

    Returns:
        `dict`: lmms-eval's results file; `["results"][task]["metric,none"]` is a score.

    Raises:
        EvaluationError: If lmms-eval failed or a task has no results.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tasks", default="robustvqa,pope")
    parser.add_argument("--batch_size", "-b", default="16")
    parser.add_argument("--output_path", default="out/eval")
    parser.add_argument("--model_args", default="")
    parser.add_argument("--use_cache", "-c")
    given, others = parser.parse_known_args(arguments)
    if "," in str(pretrained):
        raise EvaluationError(f"The checkpoint is {str(pretrained)!r}; lmms-eval takes no comma in a model argument.")
    model_args = ",".join(filter(None, [f"pretrained={pretrained}", given.model_args]))
    command = ["--model", "deem", "--model_args", model_args, "--tasks", given.tasks, "--batch_size", given.batch_size]
    if given.use_cache is not None:
        from deem_plugin.evaluation.fingerprint import fingerprint

        command += ["--use_cache", str(Path(given.use_cache).expanduser() / fingerprint(pretrained))]
    command += ["--output_path", given.output_path, *others]
    return run_lmms_eval(command, num_processes=num_processes, env=env)


def run_lmms_eval(
    arguments: Sequence[str], *, num_processes: int = 1, env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """
    Runs `python -m lmms_eval` in processes of their own, passes its output on to standard error, and returns its
    results. Sample logs are written beside the results file.

    Args:
        arguments (`Sequence[str]`): Of lmms-eval, `--tasks` and `--output_path` among them.
        num_processes (`int`, *optional*, defaults to 1): Processes on this machine that share the questions.
        env (`Mapping[str, str]`, *optional*): Environment variables on top of this process's.

    Returns:
        `dict`: The results file of this run.

    Raises:
        EvaluationError: If the output folder cannot be written, lmms-eval failed, or a task has no results.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tasks", default="")
    parser.add_argument("--output_path", required=True)
    given, others = parser.parse_known_args(arguments)
    names = [name.strip() for name in given.tasks.split(",") if name.strip()]
    if not names:
        raise EvaluationError("No task was given. `lmms-eval --tasks list` shows those that there are.")
    output = Path(given.output_path).expanduser()
    try:
        output.mkdir(parents=True, exist_ok=True)
        (probe := output / f".{os.getpid()}.probe").touch()
        probe.unlink()
    except OSError as error:
        # lmms-eval would notice only after hours of work, and say so in a line of its log.
        raise EvaluationError(f"Cannot write to the output folder {output}: {error}.") from error

    command = child_command("lmms_eval", *others)
    if num_processes > 1:
        ranks = ["--standalone", "--nproc_per_node", str(num_processes), "-m", MODULE, LAUNCHER, "lmms_eval"]
        command = child_command("torch.distributed.run", *ranks, *others)
    command += ["--tasks", ",".join(names), "--output_path", str(output)]
    command += [] if "--log_samples" in others else ["--log_samples"]
    before = set(output.rglob("*_results.json"))
    code, log = _stream(command, {**os.environ, **(env or {})})

    written = sorted(set(output.rglob("*_results.json")) - before)
    if code != 0 or not written:
        raise EvaluationError(f"lmms-eval failed on {', '.join(names)} (exit code {code}):\n{_explain(log)}")
    results = json.loads(written[-1].read_text(encoding="utf-8"))
    # What matches a pattern or stands in a file has another name in the results.
    exact = [name for name in names if re.fullmatch(r"[\w+-]+", name)]
    if absent := [name for name in exact if not _has_results(results, name)]:
        raise EvaluationError(f"lmms-eval gave no results for {', '.join(absent)}:\n{_explain(log)}")
    return results


def _stream(command: list[str], env: Mapping[str, str]) -> tuple[int, list[str]]:
    """Runs a command, passes its output on as it comes, progress bars too; returns the exit code and last lines."""
    lines: deque[str] = deque(maxlen=_TAIL_LINES)
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        rest = b""
        try:
            while piece := os.read(process.stdout.fileno(), 4096):
                sys.stderr.write(piece.decode("utf-8", errors="replace"))
                sys.stderr.flush()
                *whole, rest = (rest + piece).split(b"\n")
                lines.extend(line.decode("utf-8", errors="replace") for line in whole)
        except BaseException:
            process.terminate()
            raise
    return process.returncode, [*lines, rest.decode("utf-8", errors="replace")]


def _explain(log: list[str]) -> str:
    """Returns what the log says about a failure: its last error line, or else its last lines without progress bars."""
    lines = [_COLOUR.sub("", line.rsplit("\r", 1)[-1]).rstrip() for line in log]
    lines = [line for line in lines if line and not re.search(r"\d+%\|", line)]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    reasons = [line.split("Error during evaluation: ", 1)[1] for line in lines if "Error during evaluation: " in line]
    if reasons:
        reason = reasons[-1].removesuffix(" Please set `--verbosity=DEBUG` to get more information.").removesuffix(".")
        # The same with its type; lmms-eval also retries some steps and reports the retry, the cause stands above it.
        return "\n".join(dict.fromkeys([*errors, reason] if "RetryError" in reason else errors[-1:] or [reason]))
    return "\n".join([*errors[:3], *lines[-_SHOWN_LINES:]]) or "It wrote nothing."


def _has_results(results: Mapping[str, Any], name: str) -> bool:
    """Tells whether a task, or every task of a group, has at least one number."""
    members = results.get("group_subtasks", {}).get(name)
    if members:
        return all(_has_results(results, member) for member in members)
    row = results["results"].get(name, {})
    return any(isinstance(value, int | float) for key, value in row.items() if "_stderr" not in key)
