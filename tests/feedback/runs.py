"""Runs of a tiny LLaVA with feedback, to be cut, interrupted and repeated by the tests of weight and lifecycle."""

import socket
import subprocess
import sys
from os import environ
from pathlib import Path

import torch
from transformers import Trainer

from deem_plugin.feedback import DiffusionFeedback

from ..tiny import tiny_llava
from .helpers import GradientProbe, LoudCallback, arguments, feedback_config, pixel_diffusion_model, samples

ROOT = Path(__file__).resolve().parents[2]
TIMESTEP = 500


class UndrawnFeedback(DiffusionFeedback):
    """Draws nothing: the noise is a smooth function of the picture, so that neither order nor rounding changes it."""

    def __call__(self, latents, context, *, generator=None, **options):
        noise = torch.sin(40 * latents)
        timesteps = torch.full((len(latents),), TIMESTEP, device=latents.device)
        return super().__call__(latents, context, timesteps=timesteps, noise=noise, **options)


def undrawn_callback(objective_class=UndrawnFeedback, **settings):
    """The callback under test, whose feedback is a function of the pictures alone."""
    diffusion_model = pixel_diffusion_model()
    return LoudCallback(feedback_config(**settings), diffusion_model, objective_class(diffusion_model.denoiser))


def normalized(processor, picture):
    """Pictures in [0, 1] as the image processor gives them."""
    mean, std = (torch.tensor(getattr(processor.image_processor, f"image_{name}")) for name in ("mean", "std"))
    return (picture - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def pictures_of(processor, pixels):
    """Undoes the normalisation of pixel values."""
    black, white = (normalized(processor, torch.full((3, 1, 1), value)) for value in (0.0, 1.0))
    return (pixels - black) / (white - black)


def mixed(processor, count=4):
    """Samples with a picture and samples of text alone, by turns."""
    pairs = zip(samples(processor, count), samples(processor, count, with_images=False), strict=True)
    return [row for pair in pairs for row in pair]


def collate(rows):
    """Stacks samples, and the pictures of those that have one."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: torch.stack([row[name] for row in rows if name in row]) for name in names}


def make_trainer(
    folder,
    callback=None,
    model=None,
    rows=None,
    trainer_class=Trainer,
    callbacks=(),
    eval_dataset=None,
    model_init=None,
    processor=None,
    data_collator=collate,
    **settings,
):
    """Returns a Trainer and the probe that keeps the gradients of its steps."""
    vlm, own = tiny_llava()
    processor = own if processor is None else processor
    probe = GradientProbe()
    given = {"model_init": model_init} if model_init else {"model": vlm if model is None else model}
    trainer = trainer_class(
        **given,
        args=arguments(folder, **settings),
        train_dataset=samples(processor) if rows is None else rows,
        eval_dataset=eval_dataset,
        data_collator=data_collator,
        processing_class=processor,
        callbacks=[probe, *callbacks, *([callback] if callback else [])],
    )
    return trainer, probe


def run(folder, callback=None, **settings):
    """Trains and returns the Trainer and the gradients of each step."""
    trainer, probe = make_trainer(folder, callback, **settings)
    trainer.train()
    return trainer, probe.steps


def by_hand(rows, conversations, weight=50.0, counts=1):
    """Oracle: gradients of the language model's loss and of the feedback's, and the feedback loss of each image."""
    model, processor = tiny_llava()
    callback = undrawn_callback()
    callback.attach(model, processor)
    batch = collate(rows)
    pixels = batch["pixel_values"]
    tokens = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    errors = UndrawnFeedback(pixel_diffusion_model().denoiser)(
        2 * pictures_of(processor, pixels) - 1, callback.conditioner(tokens)
    )
    (model(**batch).loss + weight * (errors * torch.tensor(counts)).sum() / conversations).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, errors.detach()


def logged(trainer, name):
    """Returns the values of a name in the order in which they were logged."""
    return [row[name] for row in trainer.state.log_history if name in row]


def hooks_of(model):
    """Returns the numbers of hooks on the modules of a model, by name, where there are any."""
    counts = {}
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        counts[name] = sum(not is_of_transformers(hook) for hook in hooks)
    return {name: count for name, count in counts.items() if count}


def is_of_transformers(hook):
    """Tells hooks apart that transformers puts on any tower at its first call with `output_hidden_states`."""
    return hook.__module__ == "transformers.utils.output_capturing"


def rows_of_ranks(processor, kind):
    """Four samples, of which rank 0 gets the first and third, in two micro-batches, rank 1 the others."""
    if kind == "pictures":
        return samples(processor)
    picture, text = samples(processor), samples(processor, with_images=False)
    if kind == "text rank":
        return [picture[0], text[1], picture[2], text[3]]
    return [picture[0], picture[1], text[2], text[3]]


def run_two_ranks(folder, mode):
    """Runs `run_two_ranks.py` on two gloo ranks and returns what rank 0 has left in `folder`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    command += ["-m", "tests.feedback.run_two_ranks", str(folder), mode]
    environment = {**environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.load(Path(folder) / "rank0.pt", weights_only=True)
