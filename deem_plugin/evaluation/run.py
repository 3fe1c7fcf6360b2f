"""Runs lmms-eval as its users do, and finds out whether it worked: it exits with 0 even when it failed."""

import json
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_TAIL_LINES = 200  # kept of the log to explain a failure
_SHOWN_LINES = 12
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class EvaluationError(RuntimeError):
    """lmms-eval failed, whatever its exit code says."""


def evaluate(
    pretrained: str | Path,
    tasks: str | Iterable[str],
    output_dir: str | Path,
    *,
    batch_size: int = 16,
    device: str | None = None,
    dtype: str | None = None,
    limit: int | None = None,
    env: Mapping[str, str] | None = None,
    use_cache: str | Path | None = None,
) -> dict[str, Any]:
    """
    Evaluates a checkpoint with lmms-eval's model `deem`.

    Args:
        pretrained (`str` or `Path`): Checkpoint folder, hub id, or folder of a peft adapter.
        tasks (`str` or `Iterable[str]`): Tasks or groups; a string may list several, separated by commas.
        output_dir (`str` or `Path`): Where lmms-eval writes its results and sample logs.
        batch_size (`int`): Prompts answered at once.
        device (`str`, *optional*): Device, by default the best there is.
        dtype (`str`, *optional*): `float32`, `bfloat16` or `float16`; by default the checkpoint's.
        limit (`int`, *optional*): Only so many samples of each task; an even number keeps pairs of questions whole.
        env (`Mapping[str, str]`, *optional*): Environment variables on top of this process's.
        use_cache (`str` or `Path`, *optional*):
            Folder of lmms-eval's response cache: questions that were answered before are not asked again, unless the
            checkpoint or the data has changed since.

    Returns:
        `dict`: lmms-eval's results file; `["results"][task]["metric,none"]` is a score.

    Raises:
        EvaluationError: If lmms-eval failed or a task has no results.
    """
    if use_cache is not None:
        from deem_plugin.evaluation.fingerprint import fingerprint

        use_cache = Path(use_cache).expanduser() / fingerprint(pretrained)
    model_args = {"pretrained": str(pretrained), "device": device, "dtype": dtype}
    return run_lmms_eval(
        {name: value for name, value in model_args.items() if value is not None},
        tasks,
        output_dir,
        batch_size=batch_size,
        limit=limit,
        env=env,
        use_cache=use_cache,
    )


def run_lmms_eval(
    model_args: str | Mapping[str, Any],
    tasks: str | Iterable[str],
    output_dir: str | Path,
    *,
    batch_size: int,
    model: str = "deem",
    env: Mapping[str, str] | None = None,
    limit: int | None = None,
    use_cache: str | Path | None = None,
) -> dict[str, Any]:
    """
    Runs `python -m lmms_eval` in a process of its own, passes its output on to standard error, and returns its
    results. Sample logs are written beside the results file in `output_dir`.

    Args:
        model_args (`str` or `Mapping`): Arguments of the model, as `name=value,...` or as a mapping.
        tasks (`str` or `Iterable[str]`): Tasks or groups; a string may list several, separated by commas.
        output_dir (`str` or `Path`): Folder of the results; it is made where it is missing.
        batch_size (`int`): Prompts answered at once.
        model (`str`): Name of the model in lmms-eval.
        env (`Mapping[str, str]`, *optional*): Environment variables on top of this process's.
        limit (`int`, *optional*): Only so many samples of each task.
        use_cache (`str` or `Path`, *optional*):
            Folder of lmms-eval's response cache, which does not notice a changed checkpoint: see `fingerprint`.

    Returns:
        `dict`: The results file of this run.

    Raises:
        EvaluationError: If the output folder cannot be written, lmms-eval failed, or a task has no results.
    """
    names = [name.strip() for name in (tasks.split(",") if isinstance(tasks, str) else tasks) if name.strip()]
    if not names:
        raise EvaluationError("No task was given. `lmms-eval --tasks list` shows those that there are.")
    output = Path(output_dir).expanduser()
    try:
        output.mkdir(parents=True, exist_ok=True)
        (probe := output / f".{os.getpid()}.probe").touch()
        probe.unlink()
    except OSError as error:
        # lmms-eval would notice only after hours of work, and say so in a line of its log.
        raise EvaluationError(f"Cannot write to the output folder {output}: {error}.") from error

    command = [sys.executable, "-m", "lmms_eval", "--model", model, "--model_args", _joined(model_args)]
    command += ["--tasks", ",".join(names), "--batch_size", str(batch_size)]
    command += ["--log_samples", "--output_path", str(output)]
    if limit is not None:
        command += ["--limit", str(limit)]
    if use_cache is not None:
        command += ["--use_cache", str(use_cache)]
    before = set(output.rglob("*_results.json"))
    code, log = _stream(command, {**os.environ, **(env or {})})

    written = sorted(set(output.rglob("*_results.json")) - before)
    if code != 0 or not written:
        raise EvaluationError(f"lmms-eval failed on {', '.join(names)} (exit code {code}):\n{_explain(log)}")
    results = json.loads(written[-1].read_text(encoding="utf-8"))
    if absent := [name for name in names if not _has_results(results, name)]:
        raise EvaluationError(f"lmms-eval gave no results for {', '.join(absent)}:\n{_explain(log)}")
    return results


def _joined(model_args: str | Mapping[str, Any]) -> str:
    if isinstance(model_args, str):
        return model_args
    for name, value in model_args.items():
        if "," in str(value):
            raise EvaluationError(f"{name} is {str(value)!r}; lmms-eval cannot take a comma in a model argument.")
    return ",".join(f"{name}={value}" for name, value in model_args.items())


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
