"""Writes what was measured of a folder's pictures: a parquet table, and a page with a map over each picture."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from deem_plugin.evaluation.mismatch import PictureMismatch, condition_gap, find_pictures, measure_mismatch
from deem_plugin.evaluation.trained_feedback import TrainedFeedback

_QUALITY = 75
_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 1.5rem auto; padding: 0 1rem; }
p { overflow-wrap: anywhere; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .8rem; }
figure { margin: 0; content-visibility: auto; contain-intrinsic-size: 9.5rem 13rem; }
figure div { position: relative; } figure img { display: block; width: 100%; }
figure img + img { position: absolute; inset: 0; height: 100%; image-rendering: pixelated; }
.plain img + img { display: none; }
figcaption { font-size: .8rem; overflow-wrap: anywhere; line-height: 1.3; }
label { display: inline-block; margin: .5rem 0 1rem; }"""
_LEGEND = """\
Each picture was denoised given its own visual tokens and given those of other pictures, from the same noise at the \
same timesteps. The mismatch is the ratio of the two errors: near 1 the tokens tell nothing of the picture, near 0 \
all. ± is one standard error over the draws. Red cells of a map are those that the tokens tell less of"""


def write_mismatch(
    checkpoint: str | Path,
    folder: str | Path,
    out: str | Path,
    new: str | Path | None = None,
    diffusion_model: str | None = None,
    draws: int = 16,
) -> Path:
    """
    Measures a folder's pictures and writes `mismatch.parquet` and `mismatch.html`, worst pictures first; with a second
    checkpoint, what was lost from the first to it, then what was won.

    Args:
        checkpoint (`str` or `Path`): Trained with feedback.
        folder (`str` or `Path`): Of pictures; those in its folders count, too.
        out (`str` or `Path`): Folder for the two files.
        new (`str` or `Path`, *optional*): A second checkpoint.
        diffusion_model (`str`, *optional*): By default the one that `checkpoint` was trained with.
        draws (`int`, *optional*, defaults to `16`): As for [`measure_mismatch`].

    Returns:
        `Path`: The page.

    Raises:
        ValueError: If there are fewer than two pictures or draws, a checkpoint cannot be looked into, or the two were
            measured on latents of different sizes.
    """
    paths = find_pictures(folder)
    base = measure_mismatch(TrainedFeedback.load(checkpoint, diffusion_model), paths, draws)
    later = None if new is None else measure_mismatch(TrainedFeedback.load(new, diffusion_model), paths, draws)
    if later is not None and later[0].map.shape != base[0].map.shape:
        raise ValueError(
            f"{checkpoint} was measured on latents of {tuple(base[0].map.shape)} cells and {new} on "
            f"{tuple(later[0].map.shape)}. Name one diffusion model for both by `--diffusion-model`."
        )
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    rows = _rows(base, later, Path(folder))
    _write_table(rows, out / "mismatch.parquet")
    page = out / "mismatch.html"
    page.write_text(_page(rows, checkpoint, new), encoding="utf-8")
    return page


def gap_report(checkpoint: str | Path, folder: str | Path, diffusion_model: str | None = None) -> str:
    """
    Returns a Markdown table of the [`condition_gap`] of a checkpoint on a folder's pictures; arguments and errors as
    for [`write_mismatch`].
    """
    rows = condition_gap(TrainedFeedback.load(checkpoint, diffusion_model), find_pictures(folder))
    lines = ["| timesteps | own tokens | another's | zeros | gap |", "|---|---|---|---|---|"]
    for row in rows:
        errors = " | ".join(f"{row[name]:.4f}" for name in ("right", "wrong", "without"))
        gap = f"{row['gap']:.1%} ± {row['gap_standard_error']:.1%}"
        lines.append(f"| {row['first']} to {row['last']} | {errors} | {gap} |")
    lines.append(
        "\nMean denoising errors; the gap is what the own tokens save of the error with another picture's, ± one "
        "standard error over the pictures."
    )
    return "\n".join(lines)


def _rows(base: Sequence[PictureMismatch], later: Sequence[PictureMismatch] | None, folder: Path) -> list[dict]:
    """Returns a row a picture, the worst first; `difference` is the second checkpoint's mismatch less the first's."""
    rows = []
    for index, first in enumerate(base):
        row = {
            "path": str(first.path.relative_to(folder)),
            "picture": first.picture,
            "mismatch": first.mismatch,
            "standard_error": first.standard_error,
            "own_error": first.own.mean().item(),
            "other_error": first.other.mean().item(),
            "map": first.map,
        }
        if later is not None:
            second = later[index]
            # The same noises and timesteps on both sides: what they have in common falls away.
            residuals = [
                entry.own / entry.other.mean() - entry.mismatch * entry.other / entry.other.mean()
                for entry in (first, second)
            ]
            spread = (residuals[1] - residuals[0]).std() / len(first.own) ** 0.5
            row |= {
                "new_mismatch": second.mismatch,
                "new_standard_error": second.standard_error,
                "difference": second.mismatch - first.mismatch,
                "difference_standard_error": spread.item(),
                "map": second.map - first.map,
            }
        rows.append(row)
    return sorted(rows, key=lambda row: -row["difference" if later is not None else "mismatch"])


def _write_table(rows: list[dict], path: Path) -> None:
    from datasets import Dataset

    columns = [{**row, "map": row["map"].tolist()} for row in rows]
    Dataset.from_list([{name: row[name] for name in row if name != "picture"} for row in columns]).to_parquet(path)


def _page(rows: list[dict], checkpoint, new) -> str:
    compared = new is not None
    title = "Lost and won from one checkpoint to another" if compared else "How little the visual tokens tell"
    checkpoints = f"{checkpoint}, and then {new}" if compared else str(checkpoint)
    legend = f"{_LEGEND} {'in the second checkpoint than in the first, green ones more' if compared else 'than most'}."
    colour = _map_of_difference(rows) if compared else _map_of_ratio(rows)
    figures = []
    for row in rows:
        value, error = ("difference", "difference_standard_error") if compared else ("mismatch", "standard_error")
        text = f"{row[value]:+.3f}" if compared else f"{row[value]:.3f}"
        name = html.escape(row["path"])
        figures.append(
            f'<figure><div><img alt="{name}" src="{_picture(row["picture"])}">'
            f'<img alt="" src="{_overlay(colour(row))}"></div>'
            f"<figcaption>{text} ± {row[error]:.3f}<br>{name}</figcaption></figure>"
        )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1>"
        f"<p>{html.escape(checkpoints)}</p><p>{legend}</p>"
        f"<label><input type=\"checkbox\" onchange=\"document.querySelector('main').classList.toggle('plain')\"> "
        f"pictures without maps</label><main>{''.join(figures)}</main></html>\n"
    )


def _map_of_ratio(rows):
    """Returns a function of a row: its map in [0, 1], where the median of all cells and what is less is 0."""
    cells = torch.cat([row["map"].flatten() for row in rows])
    middle = cells.nanmedian()
    spread = (cells - middle).abs().nanquantile(0.95).clamp(min=1e-6)
    return lambda row: ((row["map"] - middle) / spread).clamp(0, 1).nan_to_num(0.0)


def _map_of_difference(rows):
    """Returns a function of a row: its map in [-1, 1], where no difference is 0."""
    spread = torch.cat([row["map"].flatten() for row in rows]).abs().nanquantile(0.95).clamp(min=1e-6)
    return lambda row: (row["map"] / spread).clamp(-1, 1).nan_to_num(0.0)


def _picture(picture: torch.Tensor) -> str:
    return _embed(to_pil_image(picture), "JPEG", quality=_QUALITY)


def _overlay(cells: torch.Tensor) -> str:
    """Returns a map in [-1, 1] as a picture: red where positive, green where negative, clear at 0."""
    pixels = np.zeros((*cells.shape, 4), dtype=np.uint8)
    values = cells.numpy()
    pixels[..., 0] = np.where(values > 0, 220, 0)
    pixels[..., 1] = np.where(values > 0, 20, 150)
    pixels[..., 3] = (np.abs(values) * 170).astype(np.uint8)
    return _embed(Image.fromarray(pixels), "PNG")


def _embed(image: Image.Image, kind: str, **options) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
