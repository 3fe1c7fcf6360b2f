"""A CLIP's scores by themselves as text and JSON, and before against after a training."""

import json
from pathlib import Path
from typing import Any

from deem_plugin.evaluation.compare_report import draw_forest
from deem_plugin.evaluation.encoder import EncoderData, evaluate_encoder
from deem_plugin.evaluation.statistics import Estimate, cluster_totals, estimate


def main(
    model: str,
    data: EncoderData,
    *,
    pretrained: str | None = None,
    before: str | None = None,
    out: Path | None = None,
    batch_size: int = 32,
) -> str:
    """
    Evaluates a CLIP, and an earlier one on the same data where one is given, and returns what is to be printed.

    Args:
        model, data, pretrained, batch_size: As for [`evaluate_encoder`].
        before (`str`, *optional*): Another model, named as `model` is; or the JSON file of its evaluation.
        out (`Path`, *optional*): JSON file for the scores, item by item; with `before`, a forest plot of the
            differences is put beside it.

    Raises:
        ValueError: If a model or the data cannot be used, or the file was made on other data.
    """
    result = evaluate_encoder(model, data, pretrained=pretrained, batch_size=batch_size)
    earlier = None
    if before is not None and Path(before).is_file():
        earlier = json.loads(Path(before).read_text(encoding="utf-8"))
    elif before is not None:
        earlier = evaluate_encoder(before, data, batch_size=batch_size)
    if out is not None:
        out = Path(out).expanduser()
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2), encoding="utf-8")
    if earlier is None:
        return report(result)
    differences = compare_encoders(earlier, result)
    if out is not None:
        draw_forest(out.with_suffix(".png"), differences)
    return comparison_report(earlier, result, differences)


def report(result: dict[str, Any]) -> str:
    """Returns a result of `evaluate_encoder` as text, in percent."""
    lines = []
    if scores := result.get("mmvp_vlm"):
        lines += [f"{name:<36}{100 * share:5.1f}" for name, share in scores["patterns"].items()]
    lines += [_line(title, scores) for title, scores in _metrics(result).items()]
    if scores := result.get("zero_shot"):
        lines.append(f"{'zero-shot, mean over classes':<36}{100 * scores['mean_per_class']:5.1f}")
    return "\n".join(lines)


def _line(title: str, scores: dict[str, Any]) -> str:
    return f"{title:<36}{100 * scores['value']:5.1f}  [{100 * scores['low']:.1f}, {100 * scores['high']:.1f}]"


def _metrics(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns each score of a result by its title: "value", "low", "high", and "right" by item."""
    metrics = {}
    if scores := result.get("mmvp_vlm"):
        right = {str(index): flag for index, flag in enumerate(scores["right"])}  # as JSON gives them back
        metrics["MMVP-VLM"] = {**scores, "value": scores["mean"], "right": right}
    for key, title in (("zero_shot", "zero-shot"), ("linear_probe", "linear probe")):
        if scores := result.get(key):
            title = f"{title}, {scores['pictures']} pictures of {scores['classes']} classes"
            metrics[title] = {**scores, "value": scores["accuracy"]}
    for direction in ("image to text", "text to image"):
        for rank, scores in result.get("retrieval", {}).get(direction, {}).items():
            metrics[f"{direction}, {rank}"] = scores
    return metrics


def compare_encoders(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Estimate]:
    """
    Returns the difference of two results of `evaluate_encoder` on the same data, `after` less `before`, by score, with
    its 95 % interval: a paired bootstrap over pictures (of MMVP-VLM over pairs). Raises a `ValueError` if the data are
    not the same.
    """
    first_metrics, second_metrics, differences = _metrics(before), _metrics(after), {}
    for title in {**first_metrics, **second_metrics}:
        first, second = (metrics.get(title, {"right": {}}) for metrics in (first_metrics, second_metrics))
        if not first["right"] or first["right"].keys() != second["right"].keys():
            raise ValueError(
                f"The two were not evaluated on the same data ({title}): there are {len(first['right'])} and "
                f"{len(second['right'])} items. Give the same options to both."
            )
        changes = [float(second["right"][item]) - float(flag) for item, flag in first["right"].items()]
        # The captions of a picture fail together.
        clusters = [key.rpartition("#")[0] if title.startswith("text to image") else key for key in first["right"]]
        differences[title] = estimate(cluster_totals(changes, clusters))
    return differences


def comparison_report(before: dict[str, Any], after: dict[str, Any], differences: dict[str, Estimate]) -> str:
    """Returns a Markdown table of two results on the same data, in percent and in points."""
    lines = ["| | before | after | difference [95 %] |", "|---|---|---|---|"]
    scores = zip(_metrics(before).values(), _metrics(after).values(), strict=True)
    for (title, difference), (first, second) in zip(differences.items(), scores, strict=True):
        value, low, high = (100 * number for number in (difference.value, difference.low, difference.high))
        figures = f"{100 * first['value']:.1f} | {100 * second['value']:.1f} | {value:+.1f} [{low:+.1f}, {high:+.1f}]"
        lines.append(f"| {title} | {figures} |")
    return "\n".join(lines)
