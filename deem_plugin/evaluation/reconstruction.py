"""Pictures reconstructed from a tower's tokens alone: the plainest view of what the tower has kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from deem_plugin.data.images import load_image
from deem_plugin.evaluation.trained_feedback import TrainedFeedback
from deem_plugin.feedback.sampling import sample_pictures

# Shortest side in pixels of a picture in the grid: smaller ones are enlarged, so that one can see them.
SHOWN = 128
_PADDING = 4


@dataclass
class Reconstruction:
    """
    Pictures as a tower saw them, and what a diffusion model makes of its tokens.

    Args:
        seen, sampled (`torch.Tensor`): Shape `(pictures, 3, side, side)` in [0, 1].
        psnr, ssim (`float`): Peak signal-to-noise ratio in dB and structural similarity
            (https://doi.org/10.1109/TIP.2003.819861) of the two, means over the pictures.
        similarity (`float`): Mean cosine of the tokens of the two, as the tower itself reads them.
    """

    seen: torch.Tensor
    sampled: torch.Tensor
    psnr: float
    ssim: float
    similarity: float


@torch.no_grad()
def reconstruct(
    feedback: TrainedFeedback, images: Sequence[Image.Image], *, strength=1.0, steps=50, seed=0
) -> Reconstruction:
    """
    Samples pictures from the tokens of PIL images in RGB.

    Args:
        feedback (`TrainedFeedback`): The checkpoint.
        images (`Sequence[Image]`): At least one.
        strength (`float`, *optional*, defaults to `1.0`): Noise strength in (0, 1]: at 1 nothing but the tokens is
            known of a picture, below that its noisy latents are, too.
        steps (`int`, *optional*, defaults to `50`): Denoising steps; at least one.
        seed (`int`, *optional*, defaults to `0`): Of the noise.

    Raises:
        ValueError: If `strength` or `steps` are not as described.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    if steps < 1:
        raise ValueError(f"Got {steps} denoising steps; give at least one.")
    views = [feedback.view(image) for image in images]
    frozen, generator = feedback.diffusion_model, torch.Generator(feedback.device).manual_seed(seed)
    seen = frozen.resize([view.picture.clamp(0, 1) for view in views])
    context, vector = feedback.condition(views)
    latents = frozen.encode(seen, generator=generator) if strength < 1 else None
    with feedback.maps(views):
        sampled = sample_pictures(
            frozen, context, vector=vector, steps=steps, generator=generator, latents=latents, strength=strength
        )
    again = [feedback.view(to_pil_image(picture)) for picture in sampled.cpu()]
    shown = [feedback.view(to_pil_image(picture)) for picture in seen.cpu()]
    similarities = [F.cosine_similarity(a.tokens, b.tokens, dim=-1).mean() for a, b in zip(shown, again, strict=True)]
    return Reconstruction(
        seen,
        sampled,
        peak_signal_noise_ratio(sampled, seen, data_range=1.0, reduction="elementwise_mean", dim=(1, 2, 3)).item(),
        structural_similarity_index_measure(sampled, seen, data_range=1.0).item(),
        torch.stack(similarities).mean().item(),
    )


def reconstruct_files(
    checkpoint, image_files, out, diffusion_model=None, *, before=None, strength=1.0, steps=50, seed=0
) -> dict[str, Reconstruction]:
    """
    Writes one PNG with a row of pictures as the tower saw them and, below, what is sampled from its tokens: of an
    earlier checkpoint, if one is given, and of this one. The noise is the same for both.

    Args:
        checkpoint (`str` or `Path`): Trained with feedback: model, processor and `feedback.safetensors`.
        image_files (`list[Path]`): Pictures to show.
        out (`str` or `Path`): The PNG.
        diffusion_model (`str`, *optional*): Folder or hub id; by default the one that the run was trained with.
        before (`str` or `Path`, *optional*): A checkpoint to compare with.
        strength, steps, seed: As for [`reconstruct`].

    Returns:
        `dict[str, Reconstruction]`: By the title of its row.

    Raises:
        ValueError: If the feedback of a checkpoint was not one on the tower's tokens, or as for [`reconstruct`].
    """
    if Path(out).suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"No picture can be written to {out}. Give a file that ends in .png.")
    images = [load_image(file) for file in image_files]
    checkpoints = {"reconstructed": checkpoint} if before is None else {"before": before, "after": checkpoint}
    rows = {
        title: reconstruct(
            TrainedFeedback.load(path, diffusion_model), images, strength=strength, steps=steps, seed=seed
        )
        for title, path in checkpoints.items()
    }
    first = next(iter(rows.values()))
    shown = {"original": first.seen, **{title: row.sampled for title, row in rows.items()}}
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    draw_rows(shown).save(out)
    return rows


def draw_rows(rows: dict[str, torch.Tensor]) -> Image.Image:
    """Draws rows of pictures `(pictures, 3, side, side)` in [0, 1] below each other, each with its title on top."""
    factor = -(-SHOWN // min(row.shape[-1] for row in rows.values()))
    font = ImageFont.load_default(16)
    strips = []
    for title, row in rows.items():
        grid = make_grid(row.cpu().clamp(0, 1), nrow=len(row), padding=0)
        strip = to_pil_image(grid.repeat_interleave(factor, 1).repeat_interleave(factor, 2))
        strips.append((title, strip))
    height = 16 + 3 * _PADDING
    page = Image.new(
        "RGB",
        (max(strip.width for _, strip in strips) + 2 * _PADDING, sum(strip.height + height for _, strip in strips)),
        "white",
    )
    pen, top = ImageDraw.Draw(page), 0
    for title, strip in strips:
        pen.text((_PADDING, top + _PADDING), title, "black", font)
        page.paste(strip, (_PADDING, top + height - _PADDING))
        top += strip.height + height
    return page
