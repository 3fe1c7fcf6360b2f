"""RefCOCO's questions as the tasks `deem_refcoco*` ask them: about the region itself, drawn on no picture."""

from deem_plugin.data.region_sources import DESCRIBE_QUESTION, coco_region
from deem_plugin.data.regions import compact_region


def doc_to_text(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    """Returns the question in the words of training, which are those of lmms-eval's own tasks."""
    return DESCRIBE_QUESTION


def doc_to_messages(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> list[dict]:
    """
    Returns the question with its picture, whose part carries the `region` that is meant, as training has it.

    Args:
        doc (`dict`): `image`, `bbox` (left, top, width, height) and `segmentation` (one polygon).
    """
    image = doc["image"].convert("RGB")  # not turned: regions are in the pixels as stored
    region = coco_region({"bbox": doc["bbox"], "segmentation": doc["segmentation"] and [list(doc["segmentation"])]})
    [region] = compact_region(region, *image.size, f"question {doc['question_id']}").values()
    content = [{"type": "image", "url": image, "region": region}, {"type": "text", "text": doc_to_text(doc)}]
    return [{"role": "user", "content": content}]
