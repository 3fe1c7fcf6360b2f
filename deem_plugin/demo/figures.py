"""The pictures of the demo's report."""

import json
from pathlib import Path

import matplotlib
import numpy as np
import torch
from safetensors.torch import load_file

from deem_plugin.feedback.diffusion_model import load_diffusion_model

from .arms import RECONSTRUCTED_FILE, STAGES, START, Arm
from .diffusion_model import load_code, shipped_diffusion_model
from .probes import SHOWN, reconstruct
from .scores import HEADLINES, Metric
from .sets import probe_scenes

matplotlib.use("Agg")  # files only: there may be no display
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)

COLORS = ("tab:gray", "tab:blue", "tab:green", "tab:orange", "tab:purple")
# Log entries that are averaged for a smooth curve.
SMOOTHING = 5


def draw_losses(path: Path, folder: Path, arms: dict[str, Arm]):
    """Draws the losses of both stages of every arm of a seed, one below the other."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    for color, (name, arm) in zip(COLORS, arms.items(), strict=False):
        for axis, key in zip(axes, ("loss", "feedback_loss"), strict=True):
            steps, values, offset = [], [], 0
            for stage in STAGES:
                state = json.loads((folder / name / stage / "trainer_state.json").read_text(encoding="utf-8"))
                entries = [entry for entry in state["log_history"] if key in entry]
                steps += [offset + entry["step"] for entry in entries]
                values += [entry[key] for entry in entries]
                offset += state["global_step"]
            if values:
                width = min(SMOOTHING, len(values))
                smooth = np.convolve(values, np.ones(width) / width, mode="valid")
                axis.plot(steps[width - 1 :], smooth, color=color, label=arm.title)
    axes[0].set(title="language-model loss", xlabel="step", yscale="log")
    axes[1].set(title="feedback loss", xlabel="step", yscale="log")
    for axis in axes:
        axis.grid(alpha=0.3, which="both")
        if axis.lines:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_scores(path: Path, metrics: list[dict[str, dict[str, Metric]]], arms: dict[str, Arm]):
    """Draws the headline scores side by side: bars are means over seeds, dots are seeds, lines one seed's interval."""
    figure, axis = plt.subplots(figsize=(9, 3.6), layout="constrained")
    width = 0.8 / len(arms)
    for index, (name, arm) in enumerate(arms.items()):
        for place, metric in enumerate(HEADLINES):
            seeds = [seed[name][metric] for seed in metrics]
            x = place + (index - (len(arms) - 1) / 2) * width
            value = np.mean([seed.value for seed in seeds])
            label = arm.title if place == 0 else None
            axis.bar(x, value, width * 0.9, color=COLORS[index], alpha=0.7, label=label)
            if len(seeds) == 1:
                low, high = seeds[0].interval()
                axis.errorbar(x, value, [[value - low], [high - value]], color="black", capsize=3)
            else:
                axis.plot([x] * len(seeds), [seed.value for seed in seeds], "o", color="black", markersize=3)
    axis.axhline(0.5, color="black", linewidth=0.8, linestyle="--", label="chance")
    axis.set(xticks=range(len(HEADLINES)), xticklabels=HEADLINES, ylabel="accuracy", ylim=(0, 1))
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_reconstructions(path: Path, folder: Path, arms: dict[str, Arm], probe_count: int):
    """Draws held-out scenes and below them what is reconstructed from its own code and each arm's tokens."""
    _, pictures = probe_scenes(probe_count)
    pictures = pictures[probe_count // 2 :][:SHOWN]
    diffusion_model = load_diffusion_model(str(shipped_diffusion_model()))
    with torch.no_grad():
        best = reconstruct(diffusion_model, load_code(shipped_diffusion_model())(diffusion_model.encode(pictures)))
    rows = [("original", pictures), ("from its own code\n(best case)", best)]
    for name, arm in {START: Arm("before"), **arms}.items():
        rows.append((arm.title.replace(", ", ",\n"), load_file(folder / name / RECONSTRUCTED_FILE)["reconstructed"]))
    figure, axes = plt.subplots(len(rows), SHOWN, figsize=(0.85 * SHOWN + 1.6, 0.9 * len(rows)), layout="constrained")
    for line, (title, row) in zip(axes, rows, strict=True):
        for axis, picture in zip(line, row, strict=True):
            axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
