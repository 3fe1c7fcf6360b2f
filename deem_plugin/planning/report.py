"""`deem plan`: a plan as text for the terminal and as JSON."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from deem_plugin.planning.memory import GIB, UTILISATION, find_gpu
from deem_plugin.planning.plan import ON_ANY_MACHINE, Option, Plan, Row, fit, least, make_plan, step_seconds
from deem_plugin.planning.skeleton import PICTURE_SIZE
from deem_plugin.training.parts import parameter_table
from deem_plugin.training.recipes import load_recipe

KINDS = ("weights", "gradients", "optimizer", "diffusion_model", "activations", "communication", "context")
ESTIMATES = ("activations", "communication", "context")


def main(
    name: str,
    overrides: Sequence[str],
    gpu: str | None = None,
    memory_gib: float | None = None,
    gpus: Sequence[int] = (1, 8),
    tokens: int | None = None,
    picture_size: tuple[int, int] = PICTURE_SIZE,
    out: Path | None = None,
) -> str:
    """
    Plans a recipe; what `deem plan` runs. Returns the report.

    Args:
        name, overrides: The recipe's, as `deem train` takes them.
        gpu (`str`, *optional*), memory_gib (`float`, *optional*):
            The GPU to fit, by its name or by its memory in GiB; without either nothing is compared.
        gpus (`Sequence[int]`): Numbers of GPUs.
        tokens (`int`, *optional*), picture_size (`tuple[int, int]`): As [`make_plan`] takes them.
        out (`Path`, *optional*): JSON file to write.

    Raises:
        ValueError: If there is no GPU, or one without memory, or a picture without pixels.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()  # its hints are for runs
    known = None if gpu is None else find_gpu(gpu)
    if known is not None and memory_gib is None:
        memory_gib = known.memory
    if min(gpus) < 1 or not 0 < (1 if memory_gib is None else memory_gib) < math.inf:
        raise ValueError(f"Cannot plan for {list(gpus)} GPUs of {memory_gib} GiB. Give numbers above 0.")
    if min(picture_size) < 1:
        raise ValueError(f"`--picture-size` is width and height in pixels, above 0; got {list(picture_size)}.")
    plan = make_plan(load_recipe(name, [*overrides, *ON_ANY_MACHINE]), gpus, tokens, tuple(picture_size))
    seconds = None if known is None else step_seconds(plan, known)
    if memory_gib is not None:
        fit(plan, name, overrides, gpus, int(memory_gib * GIB))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        document = as_json(plan, memory_gib) | {"estimated_step_seconds": seconds, "utilisation": UTILISATION}
        out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if seconds is None:
        return report(plan, memory_gib)
    return f"{report(plan, memory_gib)}\n\n{_time(plan, gpu, seconds)}"


def as_json(plan: Plan, memory_gib: float | None) -> dict:
    """Returns a plan as JSON can hold it: bytes, FLOPs, counts, and the totals that follow from them."""
    document = asdict(plan)
    document["flops"]["total"] = plan.flops.total
    document["gpu_memory_gib"] = memory_gib
    for written, rows in [
        (document, plan.rows),
        *zip(document["options"], [o.rows for o in plan.options], strict=True),
    ]:
        for item, row in zip(written["rows"], rows, strict=True):
            item["memory"]["total"] = row.memory.total
    return document


def report(plan: Plan, memory_gib: float | None = None) -> str:
    """
    Returns a plan as text.

    Args:
        plan (`Plan`): What to say.
        memory_gib (`float`, *optional*): Memory of a GPU in GiB, to say what fits.
    """
    batch = f"{plan.pictures} pictures"
    if plan.tokens:
        batch = f"{plan.pictures} conversations of {plan.tokens} tokens, {plan.image_tokens} of them its picture's"
    sections = [
        f"{plan.recipe}: a micro-batch on one GPU is {batch}; a step accumulates {plan.accumulation}.",
        parameter_table(plan.parameters),
        _flops_table(plan),
        _memory_table(plan.rows, memory_gib),
    ]
    if memory_gib is not None:
        sections.append(_verdict(plan, memory_gib))
    sections += [f"Supposed: {note}" for note in plan.notes]
    return "\n\n".join(sections)


def _flops_table(plan: Plan) -> str:
    flops = plan.flops
    lines = ["TFLOP of a micro-batch, forward and backward (matrix products, convolutions, attention)"]
    parts = {"model": flops.without_feedback, "latents of the pictures": flops.encoding}
    parts[plan.feedback] = flops.denoising
    for name, value in parts.items():
        if value:
            share = "" if name == "model" or not flops.without_feedback else f"{value / flops.without_feedback:+10.1%}"
            lines.append(f"{name:<34}{value / 1e12:>12.4g}{share}")
    if flops.without_feedback and flops.total > flops.without_feedback:
        lines.append(
            f"{'with feedback':<34}{flops.total / 1e12:>12.4g}{flops.total / flops.without_feedback - 1:+10.1%}"
        )
    return "\n".join(lines)


def _time(plan: Plan, gpu: str, seconds: float) -> str:
    without = plan.flops.without_feedback
    share = f", {1 - without / plan.flops.total:.1%} of it for the feedback" if without else ""
    return (
        f"Estimated: {seconds:.3g} s a step on {gpu}{share}: the FLOPs above at {UTILISATION:.0%} of the maker's "
        f"{find_gpu(gpu).tflops:g} TFLOP/s; no data, communication or optimizer."
    )


def _memory_table(rows: Sequence[Row], memory_gib: float | None) -> str:
    heads = [f"  {kind.replace('_', ' ')}{'~' if kind in ESTIMATES else ''}" for kind in KINDS] + ["  total~"]
    lines = ["GiB on each GPU (~ estimated, * as the recipe asks)"]
    lines.append(f"{'strategy':<9}{'GPUs':>4}" + "".join(heads))
    for row in rows:
        values = [*(getattr(row.memory, kind) for kind in KINDS), row.memory.total]
        line = f"{row.strategy + ('*' if row.own else ''):<9}{row.gpus:>4}"
        line += "".join(f"{value / GIB:>{len(head)}.2f}" for value, head in zip(values, heads, strict=True))
        if row.refusal is not None:
            line += f"  refused: {row.refusal}"
        elif memory_gib is not None:
            line += f"  {'fits' if row.memory.total <= memory_gib * GIB else 'does not fit'}"
        lines.append(line)
    return "\n".join(lines)


def _verdict(plan: Plan, memory_gib: float) -> str:
    def fits(rows: Sequence[Row]) -> bool:
        return least(rows).memory.total <= memory_gib * GIB

    def best(rows: Sequence[Row]) -> str:
        row = least(rows)
        return f"{row.memory.total / GIB:.1f} GiB ({row.strategy}, {row.gpus} GPU{'s' if row.gpus > 1 else ''})"

    lines = [f"As it is it takes at least {best(plan.rows)}; a GPU has {memory_gib:g} GiB."]
    if fits(plan.rows):
        return f"{lines[0]} It fits."
    lines.append("One after the other, on top of each other:")
    for option in plan.options:
        lines.append(f"  {option.name}: {best(option.rows)}{', fits' if fits(option.rows) else ''}")
        lines.append(f"    {_as_arguments(option)}")
    if not plan.options or not fits(plan.options[-1].rows):
        lines.append("It does not fit. Take more GPUs, larger ones, or a smaller model.")
    return "\n".join(lines)


def _as_arguments(option: Option) -> str:
    return " ".join(f"'{value}'" if " " in value else value for value in option.overrides)
