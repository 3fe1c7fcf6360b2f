"""
Times a feedback step with and without a latent cache, alternately: `python benchmarks/latent_cache.py`.

The sizes are those of a small Stable Diffusion: UNet of 35 million parameters, pictures of 256 pixels, latents of 32 x
32, batch 4; a CLIP of 9 million parameters that trains at 128 pixels. CPU seconds of one thread, so that other work on
the machine does not count.
"""

import logging
import statistics
import tempfile
import time

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPVisionConfig, CLIPVisionModel

from deem_plugin.feedback import Conditioner, DiffusionFeedback, DiffusionModel, UNetDenoiser, VaeCodec
from deem_plugin.feedback.latent_cache import LatentCache, LatentWriter, fingerprint, picture_keys

logger = logging.getLogger(__name__)

PAIRS = 7
BATCH = 4
CONTEXT_DIM = 256


def make_diffusion_model():
    """Makes a Stable Diffusion of 35 million parameters for pictures of 256 pixels."""
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(64, 128, 256, 256),
        layers_per_block=2,
        attention_head_dim=(1, 2, 4, 4),
        cross_attention_dim=CONTEXT_DIM,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 128, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    return DiffusionModel(UNetDenoiser(unet, DDPMScheduler()), VaeCodec(vae))


def main():
    """Reports the medians, their ratio and the cost of a look-up."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    diffusion_model = make_diffusion_model()
    config = CLIPVisionConfig(hidden_size=384, intermediate_size=1024, num_hidden_layers=6, image_size=128)
    tower = CLIPVisionModel(config)
    conditioner = Conditioner(
        384, CONTEXT_DIM, num_queries=32, resampler_dim=384, resampler_layers=2, resampler_heads=6
    )
    feedback = DiffusionFeedback(diffusion_model.denoiser)
    pictures = torch.randint(0, 256, (BATCH, 3, 128, 128)) / 255

    def step():
        started = time.process_time()
        rng = torch.Generator().manual_seed(1)
        latents = diffusion_model.encode(pictures, generator=rng)
        tokens = tower(pictures).last_hidden_state
        loss = feedback(latents, conditioner(tokens), generator=rng).mean()
        loss.backward()
        return loss.item(), time.process_time() - started

    with tempfile.TemporaryDirectory() as folder:
        with LatentWriter(folder, fingerprint(diffusion_model)) as writer:
            for key, mean, std in zip(picture_keys(pictures), *diffusion_model.posterior(pictures), strict=True):
                writer.add(key, mean, std)
        cache = LatentCache(folder, fingerprint(diffusion_model))
        seconds = {"without": [], "with": []}
        for _ in range(PAIRS):
            diffusion_model.latent_cache = None
            plain, spent = step()
            seconds["without"].append(spent)
            diffusion_model.latent_cache = cache
            cached, spent = step()
            seconds["with"].append(spent)
            if plain != cached:
                raise SystemExit(f"The losses differ: {plain} without the cache, {cached} with it.")
        started = time.process_time()
        cache.look_up(pictures)
        look_up = time.process_time() - started
    without, with_cache = (statistics.median(values[1:]) for values in seconds.values())
    ratio = statistics.median(a / b for a, b in zip(seconds["without"][1:], seconds["with"][1:], strict=True))
    logger.info(f"step without cache {without:.2f} s, with cache {with_cache:.2f} s, median ratio {ratio:.2f}")
    logger.info(f"look-up of {BATCH} pictures {look_up * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
