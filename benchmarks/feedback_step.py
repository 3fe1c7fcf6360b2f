"""
A feedback step taken apart, and what each way to make it cheaper gains and costs in accuracy:
`python -m benchmarks.feedback_step`.

The step is the authors': tower, VAE, UNet, loss and backward, without optimizer. Each option is timed in turn with the
plain step, pair by pair, so that whatever else runs on the machine slows both.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from tqdm.auto import tqdm

from benchmarks.common import check_names, clock_of, make_parser, show
from benchmarks.feedback_report import PARTS, Bench, Timing, draw_parts, figures, table
from benchmarks.feedback_setting import OPTIONS, PLAIN, Setting, make_setting, save_diffusion_model
from benchmarks.feedback_sizes import CONFIGS


class _Marked:
    """An objective that tells when it begins and ends."""

    def __init__(self, objective, mark):
        self.objective = objective
        self.denoiser = objective.denoiser
        self.mark = mark

    def __call__(self, *args, **kwargs):
        self.mark()
        errors = self.objective(*args, **kwargs)
        self.mark()
        return errors


def step(setting: Setting) -> tuple[dict[str, float], float, torch.Tensor]:
    """Runs one step; returns the seconds of its parts, the loss, and the tower's gradients as one vector."""
    from deem_plugin.feedback import ConditionConfig, DiffusionFeedback
    from deem_plugin.feedback.loss import FeedbackLoss, with_targets

    parameters = [*setting.tower.parameters(), *setting.conditioner.parameters()]
    device, times = setting.pixel_values.device, []
    clock, _ = clock_of(device)

    def mark():
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock())

    frozen, inputs = setting.diffusion_model, {"pixel_values": setting.pixel_values}
    feedback = FeedbackLoss(frozen, _Marked(DiffusionFeedback(frozen.denoiser), mark), ConditionConfig(), setting.eyes)
    generator = torch.Generator(device).manual_seed(0)  # each step draws the same
    mark()
    with frozen.on_device(device):
        posterior = setting.posterior or frozen.posterior(setting.pictures)
        latents = frozen.codec.draw(*posterior, generator=generator)
        mark()
        views = with_targets(setting.eyes.views(inputs, setting.tower(**inputs)), setting.pictures)
        losses = feedback(views, setting.conditioner, generator, latents=latents)
        mark()
    loss = losses.total / len(views)
    loss.backward()
    mark()
    gradients = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    seconds = {part: end - start for part, start, end in zip(PARTS, times, times[1:], strict=False)}
    return seconds | {"step": times[-1] - times[0]}, loss.item(), gradients


def run_bench(
    config: str = "mid", pairs: int = 10, device: str | None = None, options: Sequence[str] = tuple(OPTIONS)
) -> Bench:
    """
    Times options against the plain step, alternately.

    Args:
        config (`str`): One of `CONFIGS`.
        pairs (`int`): Pairs of steps for each option.
        device (`str`, *optional*): By default a GPU where there is one.
        options (`Sequence[str]`): Of `OPTIONS`; all by default.

    Raises:
        ValueError: If there is no such config or option.
    """
    check_names("config", [config], CONFIGS)
    check_names("option", options, OPTIONS)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bench = Bench(config, str(place), torch.get_num_threads(), clock_of(place)[1], pairs)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_diffusion_model(config, folder)
        plain, first, peak, (_, loss, gradients) = _prepared(config, place, folder, PLAIN)
        plain_steps = []
        for name in tqdm(options, desc="options"):
            try:
                setting, *once, (_, other_loss, other) = _prepared(config, place, folder, OPTIONS[name])
            except ValueError as error:
                bench.skipped[name] = str(error)
                continue
            steps, ratios = [], []
            for _ in range(pairs):
                plain_steps.append(step(plain)[0])
                steps.append(step(setting)[0])
                ratios.append(plain_steps[-1]["step"] / steps[-1]["step"])
            errors = abs(other_loss - loss) / abs(loss), ((other - gradients).norm() / gradients.norm()).item()
            bench.timings.append(Timing(name, OPTIONS[name].exact, median(ratios), _medians(steps), *errors, *once))
    bench.timings.insert(0, Timing("plain", True, 1.0, _medians(plain_steps), 0.0, 0.0, first, peak))
    return bench


def _prepared(config, device, folder, option):
    """Returns a setting, the wall time of its first step, the memory that both take, and what the step returned."""
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    setting = make_setting(config, device, folder, option)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    result = step(setting)
    first = time.perf_counter() - started
    return setting, first, torch.cuda.max_memory_allocated(device) - before if on_gpu else None, result


def _medians(steps: list[dict[str, float]]) -> dict[str, float]:
    return {part: median(seconds[part] for seconds in steps) for part in steps[0]} if steps else {}


def main(argv: Sequence[str] | None = None):
    """Times what the command line asks for."""
    parser = make_parser(__doc__)
    parser.add_argument("--config", default="mid", help="sizes: tiny, mid or paper")
    parser.add_argument("--pairs", type=int, default=10, help="pairs of steps for each option")
    arguments = parser.parse_args(argv)
    bench = run_bench(arguments.config, arguments.pairs, arguments.device, arguments.options or tuple(OPTIONS))
    show(bench, table(bench), figures(bench), draw_parts, arguments)


if __name__ == "__main__":
    main()
