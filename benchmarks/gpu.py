"""
All that only a GPU can show, in one run of at most eight minutes on a card of 80 GB: `python -m benchmarks.gpu`.

- equality: what each way to make the feedback cheaper changes of loss and gradient, against stated bounds;
- step: a step of the 7B LoRA recipe with random bfloat16 weights, with and without feedback, and its peak memory
  against `deem plan`;
- answers: lmms-eval's questions with and without a shared prefix.

It writes `gpu.json` and `gpu.md`, with the name of the card. A part that fails is named there and does not end the
others. `--device cpu --tiny` runs all of it in small, to see that it works.
"""

import argparse
import json
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks import answers, feedback_step, gpu_step

# Largest relative difference to the plain float32 step: of the loss, and of the tower's gradients.
BOUNDS = {"exact": (1e-3, 1e-2), "bfloat16": (2e-2, 0.15), "8 bit": (5e-2, 0.3), "4 bit": (0.2, 0.7)}
KINDS = {"torchao_int8": "8 bit", "bnb_8bit": "8 bit", "bnb_4bit": "4 bit"}
# Seconds after which no further part begins.
BUDGET = 420


@dataclass
class Report:
    """
    What was measured.

    Args:
        device (`str`): The card's name, or the device's.
        torch (`str`): Its version.
        seconds (`float`): Of the whole run.
        equality (`list[dict]`): A row an option: its figures, its bound and whether they are within it.
        step (`dict[str, dict]`): Figures by variant.
        answers (`dict`): Of `benchmarks.answers`.
        failed (`dict[str, str]`): Parts that failed or were not begun, and why.
    """

    device: str
    torch: str = torch.__version__
    seconds: float = 0.0
    equality: list[dict] = field(default_factory=list)
    step: dict[str, dict] = field(default_factory=dict)
    answers: dict = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def run(device: str, tiny: bool) -> Report:
    """Runs all parts on a device (`cpu`, `cuda`); `tiny` in sizes for a CPU."""
    card = torch.cuda.get_device_name(device) if device != "cpu" else "cpu"
    report, started = Report(card), time.perf_counter()

    def attempt(name: str, part: Callable[[], None]):
        if time.perf_counter() - started > BUDGET:
            report.failed[name] = f"not begun: {BUDGET} seconds were over"
            return
        try:
            part()
        except Exception:
            report.failed[name] = traceback.format_exc().strip().splitlines()[-1]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        attempt("equality", lambda: _compare_options(report, device, tiny))
        attempt("parts of the step", lambda: gpu_step.save_parts(_shape(tiny), folder))
        for variant in gpu_step.VARIANTS:
            attempt(f"step {variant}", lambda variant=variant: _time_step(report, variant, folder, tiny))
        attempt("answers", lambda: _time_answers(report, device, tiny))
    report.seconds = time.perf_counter() - started
    return report


def _shape(tiny):
    return "tiny" if tiny else "7b"


def _compare_options(report, device, tiny):
    options = [name for name in feedback_step.OPTIONS if not tiny or "compiled" not in name]
    bench = feedback_step.run_bench("tiny" if tiny else "paper", pairs=2, device=device, options=options)
    report.failed |= bench.skipped
    for timing in bench.timings[1:]:
        kind = "exact" if timing.exact else KINDS.get(timing.name, "bfloat16")
        loss, gradient = BOUNDS[kind]
        within = timing.loss_error <= loss and timing.gradient_error <= gradient
        report.equality.append({**asdict(timing), "bound": BOUNDS[kind], "within": within})


def _time_step(report, variant, folder, tiny):
    figures = gpu_step.time_step(_shape(tiny), variant, folder)
    figures["planned_bytes"] = gpu_step.planned_bytes(_shape(tiny), variant, folder)
    report.step[variant] = figures


def _time_answers(report, device, tiny):
    bench = answers.run_eval_bench(config="tiny" if tiny else "llava", pairs=1, device=device)
    report.answers = asdict(bench)
    report.answers["table"] = answers.table(bench)


def page(report: Report) -> str:
    """Returns the report as Markdown."""
    lines = [
        f"# On {report.device}",
        "",
        f"`python -m benchmarks.gpu`, torch {report.torch}, {report.seconds:.0f} s.",
        "",
        "## What each option changes of a feedback step",
        "",
        "| option | times as fast | loss differs | gradient differs | bound | within |",
        "|---|---|---|---|---|---|",
    ]
    for row in report.equality:
        bound = " / ".join(f"{value:g}" for value in row["bound"])
        differs = f"{row['loss_error']:.1e} | {row['gradient_error']:.1e}"
        within = "yes" if row["within"] else "NO"
        lines.append(f"| {row['name']} | {row['ratio']:.2f} | {differs} | {bound} | {within} |")
    lines += ["", "## A step of the 7B LoRA recipe", "", "| step | seconds | above none | peak memory | planned |"]
    lines.append("|---|---|---|---|---|")
    plain = report.step.get("without feedback", {}).get("seconds")
    for name, row in report.step.items():
        above = "–" if plain is None else f"{row['seconds'] / plain - 1:+.1%}"
        peak = "–" if "peak_bytes" not in row else f"{row['peak_bytes'] / 2**30:.1f} GiB"
        lines.append(f"| {name} | {row['seconds']:.3f} | {above} | {peak} | {row['planned_bytes'] / 2**30:.1f} GiB |")
    if report.answers:
        lines += ["", "## Answers", "", report.answers["table"]]
    if report.failed:
        lines += ["", "## Not run", "", *(f"- {name}: {reason}" for name, reason in report.failed.items())]
    return "\n".join(lines) + "\n"


def main(argv=None):
    """Runs everything and writes the two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for gpu.json and gpu.md")
    arguments = parser.parse_args(argv)
    report = run(arguments.device, arguments.tiny)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "gpu.json").write_text(json.dumps(asdict(report), indent=1))
    (arguments.out / "gpu.md").write_text(page(report))
    print(page(report))


if __name__ == "__main__":
    main()
