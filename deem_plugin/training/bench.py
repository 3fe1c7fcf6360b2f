"""
deem bench feedback: a feedback step taken apart, and what each way to make it cheaper gains and costs in accuracy.

The step is the authors': tower, VAE, UNet, loss and backward, without optimizer. Each option is timed in turn with the
plain step, pair by pair, so that whatever else runs on the machine slows both.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from tqdm.auto import tqdm

from deem_plugin.training.bench_sizes import CONFIGS

PARTS = ("encode", "tower", "denoise", "denoise backward", "tower backward")
DENOISER_PARTS = ("denoise", "denoise backward")


@dataclass(frozen=True)
class Option:
    """
    A way to make a step cheaper.

    Args:
        settings (`dict`): Of the `FeedbackConfig`.
        cached (`bool`): Whether what the VAE says is at hand; reading it from a disk adds a few ms (docs/feedback.md).
        exact (`bool`): Whether it is meant to change nothing but rounding in float32.
    """

    settings: dict = field(default_factory=dict)
    cached: bool = False
    exact: bool = True


PLAIN = Option()

OPTIONS = {
    "cached latents": Option(cached=True),
    "channels_last": Option({"channels_last": True}),
    "compiled denoiser": Option({"compile_denoiser": True}),
    "gradient checkpointing": Option({"gradient_checkpointing": True}),
    "CPU offload": Option({"cpu_offload": True}),
    "cached latents, compiled denoiser": Option({"compile_denoiser": True}, cached=True),
    "bfloat16": Option({"dtype": "bfloat16"}, exact=False),
    "torchao_int8": Option({"quantization": "torchao_int8"}, exact=False),
    "bnb_8bit": Option({"dtype": "float16", "quantization": "bnb_8bit"}, exact=False),
    "bnb_4bit": Option({"dtype": "bfloat16", "quantization": "bnb_4bit"}, exact=False),
    "cached latents, bfloat16": Option({"dtype": "bfloat16"}, cached=True, exact=False),
}


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
        first_step (`float`): Wall time of the first step, compiling included.
        peak_bytes (`int`, *optional*): Most memory of weights and step on a GPU; None elsewhere.
    """

    name: str
    exact: bool
    ratio: float
    seconds: dict[str, float]
    loss_error: float
    gradient_error: float
    first_step: float
    peak_bytes: int | None = None

    @property
    def denoiser_share(self) -> float:
        """Share of the denoiser's forward and backward in the step."""
        return sum(self.seconds[part] for part in DENOISER_PARTS) / self.seconds["step"]


@dataclass
class Bench:
    """
    A whole benchmark.

    Args:
        config (`str`): Name of the sizes.
        device (`str`): Where it ran.
        threads (`int`): CPU threads.
        clock (`str`): What was counted, see [`clock_of`].
        pairs (`int`): Pairs of steps for each option.
        timings (`list[Timing]`): The plain step, and the options.
        skipped (`dict[str, str]`): Options that cannot run here, and why.
    """

    config: str
    device: str
    threads: int
    clock: str
    pairs: int
    timings: list[Timing] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def clock_of(device: torch.device):
    """
    Returns a clock and its name: CPU seconds where one thread does all the work, so that what else runs on the machine
    counts little; wall time elsewhere.
    """
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time, "CPU seconds"
    return time.perf_counter, "wall time"


def save_generator(config: str, folder: Path):
    """Saves a Stable Diffusion of one of the `CONFIGS` in diffusers' layout, with new weights from a fixed seed."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    sizes = CONFIGS[config]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {
            "unet": UNet2DConditionModel(**sizes["unet"]),
            "vae": AutoencoderKL(**sizes["vae"]),
            "scheduler": DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index = {name: ["diffusers", type(part).__name__] for name, part in parts.items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **index}))


def make_setting(config: str, device: torch.device, folder: Path, option: Option = PLAIN) -> Setting:
    """
    Makes a step of one of the `CONFIGS` with an option on, from a fixed seed.

    Args:
        config (`str`): Name of the sizes.
        device (`torch.device`): Where it runs.
        folder (`Path`): With the generator that [`save_generator`] wrote.
        option (`Option`): The plain step by default.

    Raises:
        ValueError: If a quantization cannot be had here.
    """
    from deem_plugin.feedback import Conditioner, FeedbackConfig, load_generator
    from deem_plugin.feedback.economy import economise
    from deem_plugin.vision import DeemVisionConfig, DeemVisionTower

    sizes, settings = CONFIGS[config], FeedbackConfig(denoiser=str(folder), **option.settings)
    generator = load_generator(str(folder), settings.dtype, quantization=settings.quantization)
    economise(generator, settings)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tower = DeemVisionTower(DeemVisionConfig(class_token=False, **sizes["tower"]))
        conditioner = Conditioner(tower.config.hidden_size, generator.denoiser.context_dim)
        torch.nn.init.normal_(conditioner.head.weight, std=0.02)
        batch, side = sizes["batch"], generator.denoiser.sample_size
        channels = generator.codec.channels
        setting = Setting(
            tower.to(device).eval(),  # no stochastic depth: each step is then the same
            conditioner.to(device),
            generator.to(device),
            torch.randn(batch, 3, tower.config.image_size, tower.config.image_size).to(device),
            torch.rand(batch, 3, generator.image_size, generator.image_size).to(device),
            {
                "latent_noise": torch.randn(batch, channels, side, side).to(device),
                "noise": torch.randn(batch, channels, side, side).to(device),
                "timesteps": torch.linspace(250, 750, batch).long().to(device),
            },
        )
    if option.cached:
        with generator.present(device):
            setting.posterior = generator.posterior(setting.pictures)
    return setting


def step(setting: Setting) -> tuple[dict[str, float], float, torch.Tensor]:
    """Runs one step; returns the seconds of its parts, the loss, and the tower's gradients as one vector."""
    from deem_plugin.feedback import DiffusionFeedback

    parameters = [*setting.tower.parameters(), *setting.conditioner.parameters()]
    device, times = setting.pixel_values.device, []
    clock, _ = clock_of(device)

    def mark():
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock())

    generator, draws = setting.generator, setting.draws
    mark()
    with generator.present(device):
        posterior = setting.posterior or generator.posterior(setting.pictures)
        latents = generator.codec.draw(*posterior, noise=draws["latent_noise"])
        mark()
        context = setting.conditioner(setting.tower(setting.pixel_values).last_hidden_state)
        mark()
        judged = context.detach().requires_grad_()
        feedback = DiffusionFeedback(generator.denoiser)
        loss = feedback(latents, judged, timesteps=draws["timesteps"], noise=draws["noise"]).mean()
        mark()
        (gradient,) = torch.autograd.grad(loss, judged)
        mark()
    context.backward(gradient)
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
    for what, given, known in (("config", [config], CONFIGS), ("option", options, OPTIONS)):
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"There is no {what} {unknown[0]!r}; choose from {', '.join(known)}.")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bench = Bench(config, str(place), torch.get_num_threads(), clock_of(place)[1], pairs)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_generator(config, folder)
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
