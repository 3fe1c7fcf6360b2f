"""
deem bench feedback: a feedback step taken apart, and what each way to make it cheaper gains and costs in accuracy.

The step is the authors': tower, VAE, UNet, loss and backward, without optimizer. Each option is timed in turn with the
plain step, pair by pair, so that whatever else runs on the machine slows both.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm

PARTS = ("encode", "tower", "denoise", "denoise backward", "tower backward")
# Of the step with every exact option on, the generator's own work.
DENOISER_PARTS = ("denoise", "denoise backward")


@dataclass
class Setting:
    """
    Everything a step needs.

    Args:
        tower, conditioner (`nn.Module`): What trains.
        generator (`Generator`): What judges.
        pixel_values, pictures (`torch.Tensor`): What the tower reads, and what the generator restores, in [0, 1].
        draws (`dict[str, torch.Tensor]`): `latent_noise`, `noise` and `timesteps`.
        posterior (`tuple`, *optional*): What the VAE says of the pictures, where that is cached.
    """

    tower: torch.nn.Module
    conditioner: torch.nn.Module
    generator: object
    pixel_values: torch.Tensor
    pictures: torch.Tensor
    draws: dict[str, torch.Tensor]
    posterior: tuple | None = None


@dataclass
class Timing:
    """
    What one option gains.

    Args:
        name (`str`): The option.
        exact (`bool`): Whether it is meant to change nothing but rounding.
        ratio (`float`): Median over pairs of the plain step's time by this one's.
        seconds (`dict[str, float]`): Median time of each part, and of the whole as `step`.
        loss_error, gradient_error (`float`): Relative difference to the plain step's loss and tower gradients.
    """

    name: str
    exact: bool
    ratio: float
    seconds: dict[str, float]
    loss_error: float
    gradient_error: float


@dataclass
class Bench:
    """
    A whole benchmark.

    Args:
        config (`str`): Name of the sizes.
        device (`str`): Where it ran.
        pairs (`int`): Pairs of steps for each option.
        plain (`dict[str, float]`): Median time of each part of the plain step, and of the whole as `step`.
        timings (`list[Timing]`): The options.
    """

    config: str
    device: str
    pairs: int
    plain: dict[str, float] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)

    def denoiser_share(self) -> float:
        """Share of the generator's forward and backward in a step whose latents are cached."""
        cached = next(timing for timing in self.timings if timing.name == "cached latents").seconds
        return sum(cached[part] for part in DENOISER_PARTS) / cached["step"]


def make_setting(config: str, device: torch.device) -> Setting:
    """
    Makes a step of one of the `CONFIGS`, with new weights from a fixed seed.

    Raises:
        ValueError: If there is no such config.
    """
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    from deem_plugin.feedback import Conditioner, Generator, UNetDenoiser, VaeCodec
    from deem_plugin.vision import DeemVisionConfig, DeemVisionTower

    if config not in CONFIGS:
        raise ValueError(f"There is no config {config!r}; choose one of {', '.join(CONFIGS)}.")
    sizes = CONFIGS[config]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = DeemVisionTower(DeemVisionConfig(class_token=False, **sizes["tower"]))
        width = sizes["unet"]["cross_attention_dim"]
        conditioner = Conditioner(tower.config.hidden_size, width)
        torch.nn.init.normal_(conditioner.head.weight, std=0.02)
        unet, vae = UNet2DConditionModel(**sizes["unet"]), AutoencoderKL(**sizes["vae"])
        scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        generator = Generator(UNetDenoiser(unet, scheduler), VaeCodec(vae))
        batch, side = sizes["batch"], unet.config.sample_size
        return Setting(
            tower.to(device).eval(),  # no stochastic depth: each step is then the same
            conditioner.to(device),
            generator.to(device),
            torch.randn(batch, 3, tower.config.image_size, tower.config.image_size).to(device),
            torch.rand(batch, 3, generator.image_size, generator.image_size).to(device),
            {
                "latent_noise": torch.randn(batch, vae.config.latent_channels, side, side).to(device),
                "noise": torch.randn(batch, vae.config.latent_channels, side, side).to(device),
                "timesteps": torch.linspace(250, 750, batch).long().to(device),
            },
        )


def step(setting: Setting) -> tuple[dict[str, float], float, torch.Tensor]:
    """Runs one step; returns the seconds of its parts, the loss, and the tower's gradients as one vector."""
    from deem_plugin.feedback import DiffusionFeedback

    parameters = [*setting.tower.parameters(), *setting.conditioner.parameters()]
    device, times = setting.pixel_values.device, [0.0]

    def mark():
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    codec, draws = setting.generator.codec, setting.draws
    mark()
    posterior = setting.posterior or setting.generator.posterior(setting.pictures)
    latents = codec.draw(*posterior, noise=draws["latent_noise"])
    mark()
    context = setting.conditioner(setting.tower(setting.pixel_values).last_hidden_state)
    mark()
    judged = context.detach().requires_grad_()
    feedback = DiffusionFeedback(setting.generator.denoiser)
    loss = feedback(latents, judged, timesteps=draws["timesteps"], noise=draws["noise"]).mean()
    mark()
    (gradient,) = torch.autograd.grad(loss, judged)
    mark()
    context.backward(gradient)
    mark()
    gradients = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    seconds = {part: times[index + 2] - times[index + 1] for index, part in enumerate(PARTS)}
    return seconds | {"step": times[-1] - times[1]}, loss.item(), gradients


def _cache(setting: Setting):
    setting.posterior = setting.generator.posterior(setting.pictures)


def _cache_and_lay_out(setting: Setting):
    _cache(setting)
    setting.tower.to(memory_format=torch.channels_last)
    setting.pixel_values = setting.pixel_values.contiguous(memory_format=torch.channels_last)


def _cache_and_round(setting: Setting):
    _cache(setting)
    setting.generator.denoiser.model.to(torch.bfloat16)


# What is done to a setting before it is timed, and whether that is meant to change nothing but rounding.
OPTIONS: dict[str, tuple[Callable, bool]] = {
    "cached latents": (_cache, True),
    "cached latents, tower in channels_last": (_cache_and_lay_out, True),
    "cached latents, denoiser in bfloat16": (_cache_and_round, False),
}


def run_bench(config: str = "mid", pairs: int = 10, device: str | None = None) -> Bench:
    """
    Times every option against the plain step, alternately.

    Args:
        config (`str`): One of `CONFIGS`.
        pairs (`int`): Pairs of steps for each option.
        device (`str`, *optional*): By default a GPU where there is one.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bench = Bench(config, str(place), pairs)
    plain = make_setting(config, place)
    _, loss, gradients = step(plain)  # also warms up
    plain_steps = []
    progress = tqdm(total=pairs * len(OPTIONS), desc="pairs")
    for name, (change, exact) in OPTIONS.items():
        setting = make_setting(config, place)
        change(setting)
        _, other_loss, other_gradients = step(setting)
        steps = []
        for _ in range(pairs):
            plain_steps.append(step(plain)[0])
            steps.append(step(setting)[0])
            progress.update()
        ratios = [a["step"] / b["step"] for a, b in zip(plain_steps[-pairs:], steps, strict=True)]
        bench.timings.append(
            Timing(
                name,
                exact,
                statistics.median(ratios),
                _medians(steps),
                abs(other_loss - loss) / abs(loss),
                ((other_gradients - gradients).norm() / gradients.norm()).item(),
            )
        )
    progress.close()
    bench.plain = _medians(plain_steps)
    return bench


def _medians(steps: list[dict[str, float]]) -> dict[str, float]:
    return {part: statistics.median(seconds[part] for seconds in steps) for part in steps[0]}


def table(bench: Bench) -> str:
    """Returns the benchmark as a Markdown table, with the denoiser's share below."""
    lines = [
        f"config {bench.config}, {bench.device}, {torch.get_num_threads()} threads, medians of {bench.pairs} pairs",
        "",
        f"| step | times as fast | {' | '.join(PARTS)} | whole | loss differs | gradient differs |",
        "|---" * (6 + len(PARTS)) + "|",
        _row("plain", 1.0, bench.plain, 0.0, 0.0),
    ]
    lines += [_row(t.name, t.ratio, t.seconds, t.loss_error, t.gradient_error) for t in bench.timings]
    share = bench.denoiser_share()
    return "\n".join(
        [*lines, "", f"With cached latents the denoiser's forward and backward take {share:.0%} of a step."]
    )


def _row(name, ratio, seconds, loss_error, gradient_error) -> str:
    parts = " | ".join(f"{seconds[part]:.3f} s" for part in (*PARTS, "step"))
    return f"| {name} | {ratio:.2f} | {parts} | {loss_error:.1e} | {gradient_error:.1e} |"


def draw_parts(bench: Bench, path: str | Path):
    """Draws where the time of each step goes, as stacked bars."""
    from matplotlib import pyplot as plt

    rows = {"plain": bench.plain} | {timing.name: timing.seconds for timing in bench.timings}
    figure, axes = plt.subplots(figsize=(8, 0.6 * len(rows) + 1.2))
    left = [0.0] * len(rows)
    for part in PARTS:
        widths = [seconds[part] for seconds in rows.values()]
        axes.barh(list(rows), widths, left=left, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.legend(ncols=len(PARTS), fontsize=7, loc="upper center", bbox_to_anchor=(0.4, 1.25))
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def write_json(bench: Bench, path: str | Path):
    """Writes all figures of a benchmark."""
    from dataclasses import asdict

    Path(path).write_text(json.dumps(asdict(bench) | {"denoiser_share": bench.denoiser_share()}, indent=1))


_UNET = {
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "use_linear_projection": True,
}
_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


def _tower(image_size, depths, dims, width, queries, hidden, layers, heads) -> dict:
    return {
        "open_clip_config": {
            "timm_model_name": "convnext_base",
            "image_size": image_size,
            "timm_kwargs": {"depths": depths, "dims": dims},
        },
        "embed_dim": width,
        "num_queries": queries,
        "resampler_hidden_size": hidden,
        "resampler_num_layers": layers,
        "resampler_num_heads": heads,
    }


# Sizes by name: `mid` is between a toy and the paper's own, which is `paper` (a GPU's work).
CONFIGS = {
    "tiny": {
        "batch": 2,
        "tower": _tower(64, [1, 1, 2, 1], [8, 16, 32, 64], 32, 8, 32, 2, 4),
        "unet": _UNET
        | {
            "sample_size": 8,
            "block_out_channels": (16, 32, 32, 32),
            "attention_head_dim": (2, 4, 4, 4),
            "norm_num_groups": 8,
            "cross_attention_dim": 32,
        },
        "vae": _VAE | {"sample_size": 64, "block_out_channels": (8, 16, 16, 16), "norm_num_groups": 4},
    },
    "mid": {
        "batch": 4,
        "tower": _tower(128, [2, 2, 6, 2], [48, 96, 192, 384], 256, 32, 384, 6, 6),
        "unet": _UNET
        | {
            "sample_size": 32,
            "block_out_channels": (64, 128, 256, 256),
            "attention_head_dim": (1, 2, 4, 4),
            "cross_attention_dim": 256,
        },
        "vae": _VAE | {"sample_size": 256, "block_out_channels": (32, 64, 128, 128)},
    },
    "paper": {
        "batch": 4,
        "tower": _tower(256, [3, 3, 27, 3], [128, 256, 512, 1024], 1024, 77, 768, 12, 12),
        "unet": _UNET
        | {
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "attention_head_dim": (5, 10, 20, 20),
            "cross_attention_dim": 1024,
        },
        "vae": _VAE | {"sample_size": 512, "block_out_channels": (128, 256, 512, 512)},
    },
}
