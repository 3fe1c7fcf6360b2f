"""
How much visual tokens tell of each picture: the denoising error given its own tokens, against that given other
pictures' tokens.

The error by itself says how hard a picture is to denoise; a blank wall is easy whatever the tokens say. So each
picture is denoised twice, from the same noise at the same timestep, and the two errors are compared.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm

from deem_plugin.data.images import load_image
from deem_plugin.evaluation.trained_feedback import TrainedFeedback
from deem_plugin.feedback.pictures import fit, latent_mask
from deem_plugin.feedback.timesteps import TIMESTEP_SAMPLERS
from deem_plugin.vision.views import View

# Pictures whose tokens stand in for those of the others.
NUM_REFERENCES = 64
# Longest side in pixels of the pictures that are kept to be shown.
THUMBNAIL = 144


@dataclass
class PictureMismatch:
    """
    What was measured of one picture.

    Args:
        path (`Path`): Its file.
        own, other (`torch.Tensor`): Denoising error of each draw given its own and another picture's tokens,
            `(draws,)`.
        own_map, other_map (`torch.Tensor`): The same by latent cell, mean over the draws, `(height, width)`; NaN where
            a cell does not count, as in the bars of a letterbox.
        picture (`torch.Tensor`): The picture as the tower saw it, in the square that is denoised, small, in [0, 1],
            `(3, side, side)`.
    """

    path: Path
    own: torch.Tensor
    other: torch.Tensor
    own_map: torch.Tensor
    other_map: torch.Tensor
    picture: torch.Tensor

    @property
    def mismatch(self) -> float:
        """Own error as a share of the other: near 1 the tokens tell nothing of the picture, near 0 all."""
        return (self.own.mean() / self.other.mean()).item()

    @property
    def standard_error(self) -> float:
        """Standard error of [`mismatch`] over the draws: that of a ratio of means (Cochran 1977, Eq. 2.39)."""
        residuals = self.own - self.mismatch * self.other
        return (residuals.std() / (len(self.own) ** 0.5 * self.other.mean())).item()

    @property
    def map(self) -> torch.Tensor:
        """
        The same by latent cell and its neighbours, `(height, width)`. The picture's mean is added to both errors: what
        is easy to denoise, as a plain background is, would have any ratio.
        """
        own, other = _smooth(self.own_map), _smooth(self.other_map)
        prior = self.other_map.nanmean()
        return (own + prior) / (other + prior)


@torch.no_grad()
def measure_mismatch(
    feedback: TrainedFeedback, paths: Sequence[Path], draws: int = 16, batch_size: int = 8, seed: int = 0
) -> list[PictureMismatch]:
    """
    Measures the mismatch of pictures, in their order.

    Noises and timesteps are drawn once and serve all pictures, both conditions and, with the same seed, every
    checkpoint, so that two of them can be compared picture by picture.

    Args:
        feedback (`TrainedFeedback`): The checkpoint.
        paths (`Sequence[Path]`): Picture files, at least two.
        draws (`int`, *optional*, defaults to `16`): Noises and timesteps, each with the tokens of another picture; at
            least two. Timesteps are drawn as in the training.
        batch_size (`int`, *optional*, defaults to `8`): Pictures that are denoised together.
        seed (`int`, *optional*, defaults to `0`): Of all that is drawn.

    Raises:
        ValueError: If there are fewer than two pictures or draws.
    """
    generator = torch.Generator().manual_seed(seed)
    sampler = TIMESTEP_SAMPLERS[feedback.config.objective.timestep_sampling]
    process = feedback.diffusion_model.denoiser.process
    timesteps = sampler(draws, process.num_train_timesteps, generator=generator, device=torch.device("cpu"))
    measured = []
    for path, picture, errors in _denoised(feedback, paths, timesteps, generator, batch_size):
        own, other = errors.flatten(2).nanmean(2)
        measured.append(PictureMismatch(path, own, other, *errors.mean(1), picture))
    return measured


@torch.no_grad()
def condition_gap(
    feedback: TrainedFeedback,
    paths: Sequence[Path],
    bins: int = 10,
    draws: int = 4,
    batch_size: int = 8,
    seed: int = 0,
) -> list[dict]:
    """
    Measures how much the condition helps the diffusion model, by timestep: how much a tower can be taught through it.

    Args:
        feedback (`TrainedFeedback`): A checkpoint, of `feedback.conditioner_only` for the tower as it is.
        paths (`Sequence[Path]`): Picture files, at least two.
        bins (`int`, *optional*, defaults to `10`): Equal parts of the noise schedule.
        draws (`int`, *optional*, defaults to `4`): Noises and timesteps in each of them.
        batch_size, seed: As for [`measure_mismatch`].

    Returns:
        `list[dict]`: For each part `first` and `last` (timesteps); the mean errors `right`, `wrong` and `without`,
        given the picture's own tokens, those of another, and zeros; `gap`, by how much `right` is below `wrong` as a
        share of it; and `gap_standard_error`, over the pictures.

    Raises:
        ValueError: If there are fewer than two pictures.
    """
    generator = torch.Generator().manual_seed(seed)
    edges = torch.linspace(0, feedback.diffusion_model.denoiser.process.num_train_timesteps, bins + 1).long()
    parts = list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
    timesteps = torch.cat([torch.randint(*part, (draws,), generator=generator) for part in parts])
    measured = _denoised(feedback, paths, timesteps, generator, batch_size, without=True)
    # (3, pictures, bins)
    errors = torch.stack([e.flatten(2).nanmean(2).unflatten(1, (bins, draws)).mean(2) for _, _, e in measured], dim=1)
    rows = []
    for (first, end), (right, wrong, without) in zip(parts, errors.unbind(2), strict=True):
        gap = 1 - right.mean() / wrong.mean()
        residuals = right - (1 - gap) * wrong
        rows.append(
            {
                "first": first,
                "last": end - 1,
                "right": right.mean().item(),
                "wrong": wrong.mean().item(),
                "without": without.mean().item(),
                "gap": gap.item(),
                "gap_standard_error": (residuals.std() / (len(right) ** 0.5 * wrong.mean())).item(),
            }
        )
    return rows


def _denoised(feedback, paths, timesteps, generator, batch_size, without=False):
    """
    Yields each picture's path, itself in the square that is denoised, and the errors `(2, draws, h, w)` at
    `timesteps` given its own tokens and another's, and, if asked, a third given zeros.
    """
    if len(paths) < 2 or len(timesteps) < 2:
        raise ValueError(
            f"Got {len(paths)} picture(s) and {len(timesteps)} draw(s). Each one is compared with the tokens of "
            f"others, and the standard error is over the draws: give at least two of both."
        )
    chosen = torch.randperm(len(paths), generator=generator)[:NUM_REFERENCES].tolist()
    references = {index: _view(feedback, paths[index]) for index in tqdm(chosen, desc="references")}
    # Which one stands in for each picture's own at each draw; one place further where it would be itself.
    stand_ins = torch.randint(len(chosen), (len(timesteps), len(paths)), generator=generator).tolist()
    seeds = torch.randint(2**31, (len(timesteps),), generator=generator).tolist()
    for start in tqdm(range(0, len(paths), batch_size), desc="denoising"):
        indices = range(start, min(start + batch_size, len(paths)))
        views = [_view(feedback, paths[index]) for index in indices]
        pictures, latents, mask = _latents(feedback, views)
        errors = []
        for timestep, row, noise_seed in zip(timesteps, stand_ins, seeds, strict=True):
            others = [_other(references, chosen, index, row[index]) for index in indices]
            noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(noise_seed))
            drawn = latents, noise.to(latents), timestep.to(latents.device)
            given = [_errors(feedback, group, *drawn) for group in (views, others)]
            if without:
                given.append(_errors(feedback, views, *drawn, informed=False))
            errors.append(torch.stack(given).masked_fill(mask == 0, torch.nan).cpu())
        for place, index in enumerate(indices):
            yield paths[index], pictures[place], torch.stack([draw[:, place] for draw in errors], dim=1)


def _view(feedback, path) -> View:
    return feedback.view(load_image(path))


def _other(references, chosen, index, place) -> View:
    """Returns a reference that is another picture than `index`."""
    if chosen[place] == index:
        place = (place + 1) % len(chosen)
    return references[chosen[place]]


def _latents(feedback, views):
    """
    Returns the pictures in the squares that are denoised, small `(views, 3, side, side)`; the latents `(views,
    channels, h, w)`, the mean where an autoencoder draws; and which cells count `(views, h, w)`.
    """
    frozen = feedback.diffusion_model
    fitted = [fit(view.picture.clamp(0, 1), view.mask, frozen.image_size) for view in views]
    pictures = torch.cat([picture for picture, _ in fitted])
    posterior = frozen.codec.posterior(pictures * 2 - 1)
    latents = frozen.codec.draw(*posterior, noise=torch.zeros_like(posterior[0]))
    mask = latent_mask([mask for _, mask in fitted], latents.shape[-2:], latents.device)
    small = F.interpolate(pictures, min(THUMBNAIL, frozen.image_size), mode="bilinear", antialias=True).cpu()
    return small, latents, torch.ones_like(latents[:, 0]) if mask is None else mask[:, 0].expand_as(latents[:, 0])


def _errors(feedback, views, latents, noise, timestep, informed=True):
    """Returns the squared error of the prediction by latent cell, mean over the channels, `(views, h, w)`, float32."""
    denoiser = feedback.diffusion_model.denoiser
    context, vector = feedback.condition(views)
    noise, timesteps = noise.expand_as(latents), timestep.expand(len(latents))
    if not informed:
        context, vector = torch.zeros_like(context), None if vector is None else torch.zeros_like(vector)
    with feedback.maps(views) if informed else nullcontext():
        prediction = denoiser(denoiser.process.noise(latents, noise, timesteps), timesteps, context, vector)
    target = denoiser.process.target(latents, noise, timesteps)
    return (prediction.float() - target.float()).square().mean(dim=1)


def _smooth(cells):
    """Averages cells `(height, width)` over blocks of 3 x 3, without those that do not count (NaN)."""
    counted = ~cells.isnan()
    pair = torch.stack([cells.nan_to_num(0.0), counted.float()])[:, None]
    total, count = F.avg_pool2d(pair, 3, stride=1, padding=1)[:, 0]
    return torch.where(counted, total / count.clamp(min=1e-6), torch.nan)


def find_pictures(folder: str | Path) -> list[Path]:
    """
    Returns the picture files of a folder and the folders in it, sorted by path.

    Raises:
        ValueError: If there is none.
    """
    known = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in known and path.is_file())
    if not paths:
        raise ValueError(f"There is no picture file in {folder}. Give a folder of pictures.")
    return paths
