"""Writes the comparison of two runs for people (Markdown, HTML, a forest plot) and for programs (JSON)."""

import base64
import html
import io
import json
import math
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from deem_plugin.evaluation.compare import Comparison, Comparisons, Flip, compare_runs
from deem_plugin.evaluation.statistics import Estimate

_SHOWN = 20  # flips of a kind that the Markdown lists
_PIXELS = 224  # longer side of the images in the HTML
_KINDS = {"lost": "Better in the base", "gained": "Better now"}

_HEADER = ["task", "metric", "questions", "images", "base", "new", "difference [95 %]", "lost", "gained", "p"]
_LEGEND = """\
Differences are new minus base, question by question; the interval is that of a bootstrap over images with all their \
questions (percentiles, 95 %). A metric of pairs counts pairs for questions. p is that of the exact sign test, which \
is McNemar's for scores of 0 and 1: could as many answers have changed either way by chance? It takes questions for \
independent, which those about one image are not. So trust the interval where the two disagree, but the test where \
hardly anything changed (fewer than ten answers), for which a bootstrap is too sure. Compare twenty tasks without any \
difference, and the interval of one leaves out zero by chance."""
_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } td, th { border: 1px solid #ccc; padding: .3rem .6rem; text-align: left; }
img { max-width: 100%; } td img { display: block; } th { background: #f4f4f4; }"""


class MissingPlotting(RuntimeError):
    """matplotlib is not installed."""


def main(base_dir: Path, new_dir: Path, out: Path | None = None, with_html: bool = False) -> Path:
    """
    Compares two run directories and writes `compare.md`, `compare.json`, `compare.png`, and `compare.html` if asked.

    Args:
        base_dir (`Path`): Run directory of lmms-eval that is compared with.
        new_dir (`Path`): The one in question.
        out (`Path`, *optional*): Folder for the files; by default `new_dir`.
        with_html (`bool`): Whether to write the page with all flips and their images.

    Returns:
        `Path`: The Markdown file.

    Raises:
        MissingPlotting: If matplotlib is not installed.
        SampleLogError: If a directory holds no sample logs or damaged ones.
        CompareError: If the runs have no task in common, or saw different data.
    """
    if find_spec("matplotlib") is None:
        raise MissingPlotting(
            "The forest plot needs matplotlib, which is not installed: `pip install 'deem-plugin[demo]'`."
        )
    comparisons = compare_runs(base_dir, new_dir)
    out = Path(new_dir if out is None else out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    results = [*comparisons.groups, *comparisons.tasks]
    draw_forest(out / "compare.png", {f"{result.task}, {result.metric}": result.difference for result in results})
    _write(out / "compare.json", json.dumps(to_json(comparisons), indent=1, ensure_ascii=False))
    if with_html:
        _write(out / "compare.html", to_html(comparisons, out / "compare.png"))
    return _write(out / "compare.md", to_markdown(comparisons))


def _write(path: Path, text: str) -> Path:
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _rows(comparisons: Comparisons) -> Iterable[list[str]]:
    """Yields the cells of the table of differences, under `_HEADER`."""
    members = {name: len(new) for name, new in comparisons.new.groups.items()}
    for result in [*comparisons.groups, *comparisons.tasks]:
        title = f"{result.task} (mean of {members[result.task]})" if result in comparisons.groups else result.task
        yield [
            title,
            result.metric,
            str(result.questions),
            "?" if result.images is None else str(result.images),
            f"{result.base:.3f}",
            f"{result.new:.3f}",
            f"{result.difference.value:+.3f} {_interval(result)}",
            str(len(result.lost)),
            str(len(result.gained)),
            "" if result.p_value is None else f"{result.p_value:.2g}",
        ]


def _interval(result: Comparison) -> str:
    if math.isnan(result.difference.low):
        return "[one image only]"
    return f"[{result.difference.low:+.3f}, {result.difference.high:+.3f}]"


def _notes(comparisons: Comparisons) -> list[str]:
    """Returns what a reader must know of these runs beyond the legend."""
    notes = [
        f"{name}: {run.model}, evaluated {', '.join(run.dates)}, in {run.folder}"
        for name, run in (("Base", comparisons.base), ("New", comparisons.new))
    ]
    if unknown := {result.task: None for result in comparisons.tasks if result.images is None}:
        notes.append(
            f"Which questions share an image is not known for {', '.join(unknown)}: they were taken for independent, "
            f"so the intervals are too narrow. The logs name no image, and the data is not where the run had it "
            f"(for an imported POPE, set LMMS_EVAL_DATASETS_CACHE as then)."
        )
    if unhashed := {result.task: None for result in comparisons.tasks if not result.same_data}:
        notes.append(
            f"Both runs answered the same questions (ids, prompts, targets). For {', '.join(unhashed)} the results "
            f"files carry no content hash, so that nothing tells whether the images were the same, too."
        )
    for reason in sorted(set(comparisons.left_out.values())):
        names = sorted(name for name, given in comparisons.left_out.items() if given == reason)
        notes.append(f"Not compared ({reason}): {'; '.join(names)}.")
    return notes


def _markdown_table(header: list[str], rows: Iterable[list[str]]) -> str:
    escaped = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *escaped))


def to_markdown(comparisons: Comparisons) -> str:
    """Renders the table of differences, the notes, and up to 20 flips of each task and direction."""
    parts = [
        "# Two runs, question by question",
        "\n".join(f"* {note}" for note in _notes(comparisons)),
        _markdown_table(_HEADER, _rows(comparisons)),
        _LEGEND,
        "![differences with their intervals](compare.png)",
        "## Flips",
    ]
    for result in comparisons.tasks:
        for kind, title in _KINDS.items():
            flips = getattr(result, kind)
            if not flips:
                continue
            parts.append(f"### {result.task}, {result.metric}: {title.lower()} ({len(flips)})")
            parts.append(_markdown_table(["question", *_FLIP_HEADER], [_flip_row(flip) for flip in flips[:_SHOWN]]))
            if len(flips) > _SHOWN:
                parts.append(f"{len(flips) - _SHOWN} more are in compare.json, and with images in `--html`.")
    if not any(result.lost or result.gained for result in comparisons.tasks):
        parts.append("Not one score changed.")
    return "\n\n".join(parts)


_FLIP_HEADER = ["prompt", "right answer", "base said", "new said"]


def _flip_row(flip: Flip) -> list[str]:
    return [flip.question, flip.prompt, flip.target, flip.base_answer or "(nothing)", flip.new_answer or "(nothing)"]


def to_json(comparisons: Comparisons) -> dict:
    """Returns all numbers and all flips, as JSON can hold them (an interval that is not known is null)."""

    def number(value: float) -> float | None:
        return None if math.isnan(value) else value

    def entry(result: Comparison) -> dict:
        difference = {name: number(value) for name, value in vars(result.difference).items()}
        flips = {kind: [vars(flip) for flip in getattr(result, kind)] for kind in _KINDS}
        names = ("questions", "images", "same_data", "base", "new", "p_value")
        return {**{name: getattr(result, name) for name in names}, "difference": difference, **flips}

    def by_metric(results: list[Comparison]) -> dict[str, dict]:
        entries: dict[str, dict] = {}
        for result in results:
            entries.setdefault(result.task, {})[result.metric] = entry(result)
        return entries

    return {
        **{
            name: {"folder": str(run.folder), "model": run.model, "dates": run.dates}
            for name, run in (("base", comparisons.base), ("new", comparisons.new))
        },
        "tasks": by_metric(comparisons.tasks),
        "groups": by_metric(comparisons.groups),
        "left_out": comparisons.left_out,
    }


def to_html(comparisons: Comparisons, plot: Path) -> str:
    """Renders one self-contained page: the table, the plot, and every flip with its image where the data is found."""
    embedded = base64.b64encode(plot.read_bytes()).decode()
    body = [
        "<h1>Two runs, question by question</h1>",
        "<ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in _notes(comparisons)) + "</ul>",
        _html_table(_HEADER, ([html.escape(cell) for cell in row] for row in _rows(comparisons))),
        f"<p>{html.escape(_LEGEND)}</p>",
        f'<img alt="differences with their intervals" src="data:image/png;base64,{embedded}">',
    ]
    for result in comparisons.tasks:
        for kind, title in _KINDS.items():
            if not (flips := getattr(result, kind)):
                continue
            body.append(f"<h2>{html.escape(f'{result.task}, {result.metric}')}: {title.lower()} ({len(flips)})</h2>")
            rows = ([_image_tag(result, flip), *map(html.escape, _flip_row(flip))] for flip in flips)
            body.append(_html_table(["image", "question", *_FLIP_HEADER], rows))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Two runs, question by question</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>"
    )


def _html_table(header: list[str], rows: Iterable[list[str]]) -> str:
    head = "".join(f"<th>{cell}</th>" for cell in header)
    lines = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{lines}\n</table>"


def _image_tag(result: Comparison, flip: Flip) -> str:
    if result.documents is None:
        return "not found"
    image = result.documents.image(flip.doc_id)
    image.thumbnail((_PIXELS, _PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def draw_forest(path: Path, differences: dict[str, Estimate]):
    """Draws differences by name with their intervals, one a line, around the line of no difference."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.9 + 0.4 * len(differences)), layout="constrained")
    FigureCanvasAgg(figure)  # draws to files whatever backend the process uses
    axis = figure.add_subplot()
    axis.axvline(0, color="black", linewidth=0.8)
    for line, difference in enumerate(differences.values()):
        known = not math.isnan(difference.low)
        reach = [
            [difference.value - difference.low if known else 0],
            [difference.high - difference.value if known else 0],
        ]
        # An interval of percentiles may leave out the value itself when there are only a few images.
        reach = [[max(0.0, length) for length in side] for side in reach]
        axis.errorbar(difference.value, line, xerr=reach, fmt="s", color="tab:blue", capsize=3)
    axis.set(
        yticks=range(len(differences)),
        yticklabels=list(differences),
        xlabel="difference, new minus base, with its 95 % interval",
        ylim=(len(differences) - 0.5, -0.5),
    )
    axis.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=110)
