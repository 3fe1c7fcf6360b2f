"""
Trains the demo's diffusion model, a pixel-space diffusion transformer of half a million weights.

    python -m deem_plugin.demo.diffusion_model OUT

writes the diffusers folder that ships as `deem_plugin/demo/pretrained_diffusion_model/`: two minutes on one CPU core.
The diffusion model has seen scenes in which nothing gives anything else away (the vision-language model never does),
and a linear code of each picture as its condition. Training with feedback never uses the code: like a Stable Diffusion
whose text encoder is left out, the diffusion model brings the knowledge of what pictures look like and the habit of
reading eight tokens. Only the report uses it, to read all arms' tokens alike.
"""

import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, PixArtTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from deem_plugin.demo.scenes import render_scenes, sample_scenes

IMAGE_SIZE = 16  # pixels
CONTEXT_TOKENS = 8
CONTEXT_DIM = 64
STEPS = 1200
SCENES = 10_000
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
WARMUP_STEPS = 50
# Share of pictures whose condition is left out, so that the diffusion model also knows pictures in general.
DROP_RATE = 0.1
SEED = 123
CODE_FILE = "picture_code.safetensors"


def shipped_diffusion_model() -> Path:
    """Returns the folder of the diffusion model that ships with the package."""
    return Path(__file__).resolve().parent / "pretrained_diffusion_model"


def build_transformer() -> PixArtTransformer2DModel:
    """Makes the untrained network: 16 patches of 4 x 4 pixels, three blocks of width 96."""
    return PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=32,
        cross_attention_dim=96,
        num_layers=3,
        in_channels=3,
        out_channels=3,
        sample_size=IMAGE_SIZE,
        patch_size=4,
        caption_channels=CONTEXT_DIM,
    )


def build_scheduler() -> DDPMScheduler:
    """
    Makes the forward process: Stable Diffusion's betas with v-prediction.

    At this size a network that predicts the noise learns colours only: right and wrong shapes get the same error.
    """
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=True,
    )


class PictureCode(nn.Module):
    """Linear code of a picture: `(batch, 3, 16, 16)` in [-1, 1] to `(batch, 8, 64)` of unit scale."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * IMAGE_SIZE**2, CONTEXT_TOKENS * CONTEXT_DIM)
        self.norm = nn.LayerNorm(CONTEXT_DIM, elementwise_affine=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(pixels.flatten(1)).view(-1, CONTEXT_TOKENS, CONTEXT_DIM))


def train_diffusion_model(
    steps: int = STEPS, scenes: int = SCENES
) -> tuple[PixArtTransformer2DModel, DDPMScheduler, PictureCode]:
    """
    Trains the diffusion model from scratch, the same on every call.

    Args:
        steps (`int`): Optimizer steps.
        scenes (`int`): Scenes to train on.

    Returns:
        `tuple`: The network, its noise scheduler, and the code that it was conditioned on.
    """
    generator = torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng():  # weights are drawn from torch's global generator, which is given back as it was
        torch.manual_seed(SEED)
        transformer, code = build_transformer(), PictureCode()
    scheduler = build_scheduler()
    pixels = render_scenes(sample_scenes(scenes, generator), IMAGE_SIZE, generator=generator) * 2 - 1

    parameters = [*transformer.parameters(), *code.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    progress = tqdm(range(steps), desc="diffusion model", dynamic_ncols=True)
    for step in progress:
        batch = pixels[torch.randint(len(pixels), (BATCH_SIZE,), generator=generator)]
        kept = torch.rand(BATCH_SIZE, 1, 1, generator=generator) >= DROP_RATE
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (BATCH_SIZE,), generator=generator)
        noise = torch.randn(batch.shape, generator=generator)
        prediction = transformer(
            scheduler.add_noise(batch, noise, timesteps),
            encoder_hidden_states=code(batch) * kept,
            timestep=timesteps,
        ).sample
        loss = F.mse_loss(prediction, scheduler.get_velocity(batch, noise, timesteps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    return transformer.eval(), scheduler, code.eval()


def save_diffusion_model(
    transformer: PixArtTransformer2DModel, scheduler: DDPMScheduler, code: PictureCode, out: str | Path
) -> Path:
    """Writes a diffusers folder without a VAE, which makes it a model that works on pixels, and the code beside it."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    save_file(code.state_dict(), out / CODE_FILE)
    transformer.save_pretrained(out / "transformer")
    scheduler.save_pretrained(out / "scheduler")
    index = {
        "_class_name": "DiffusionPipeline",
        "scheduler": ["diffusers", type(scheduler).__name__],
        "transformer": ["diffusers", type(transformer).__name__],
    }
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return out


def load_code(folder: str | Path) -> PictureCode:
    """Returns the code of a saved diffusion model."""
    code = PictureCode()
    code.load_state_dict(load_file(Path(folder) / CODE_FILE))
    return code.eval()


def main(arguments: list[str]) -> int:
    """Trains the diffusion model and writes it to the folder named by the only argument."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m deem_plugin.demo.diffusion_model OUT\n")
        return 2
    save_diffusion_model(*train_diffusion_model(), arguments[0])
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
