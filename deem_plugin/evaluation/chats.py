"""What a request asks of the model: chat messages with their pictures, or one region of a picture."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from deem_plugin.data.chat import render_chat

# lmms-eval's tasks that ask for a description of a region; their `rec` variants ask for a box instead.
_ABOUT_A_REGION = re.compile(r"refcoco[+g]?_(bbox|seg)_(?!rec)")


@dataclass
class Chat:
    """
    One prompt.

    Args:
        messages (`list[dict]`): With a mark for each image, as `render_chat` takes them.
        images (`list[PIL.Image.Image]`): The images in the order of their marks.
        task, doc_id (`str` and `int`): Of which task and document it is.
        regions (`list`): For each image the region that is meant of it, or `None` for all of it.
        prompt (`str`, *optional*): The whole prompt, where it is not to be rendered by the chat template.
    """

    messages: list[dict]
    images: list[Image.Image]
    task: str
    doc_id: int
    regions: list[Any]
    prompt: str | None = None

    def render(self, processor) -> str:
        """Returns the prompt as text."""
        if self.prompt is not None:
            return self.prompt
        return render_chat(processor, self.messages, add_generation_prompt=True)

    @property
    def question(self) -> str:
        """The text of the last message."""
        return "\n".join(part["text"] for part in self.messages[-1]["content"] if part["type"] == "text")


def read_messages(messages: list[dict], task: str, doc_id: int) -> Chat:
    """Makes a chat of lmms-eval's messages; raises a `ValueError` on parts that are neither text nor image."""
    images, plain = [], []
    for message in messages:
        content = message["content"]
        parts = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                parts.append({"type": "text", "text": part["text"]})
            elif part["type"] == "image":
                image = part["url"]
                images.append((image if isinstance(image, Image.Image) else Image.open(image)).convert("RGB"))
                parts.append({"type": "image"})
            else:
                raise ValueError(f"A task hands over {part['type']!r}; the model `deem` takes text and images only.")
        plain.append({"role": message["role"], "content": parts})
    return Chat(plain, images, task, doc_id, [None] * len(images))


def asks_for_a_region(task: str) -> bool:
    """Tells whether a task of lmms-eval asks to describe a region: `refcoco_bbox_val`, `refcocog_seg_test`, ..."""
    return _ABOUT_A_REGION.match(task) is not None


def about_region(chat: Chat, doc: Mapping[str, Any]) -> Chat:
    """
    Asks about the region itself instead of a line that the task has drawn on the picture.

    The prompt is what the model has learned from `data.region_sources`: the picture, a line break, the question.

    Args:
        chat (`Chat`): Of one of lmms-eval's RefCOCO tasks.
        doc (`Mapping`): Its document: `image`, `bbox` (left, top, width, height) and `segmentation` (one polygon).
    """
    from deem_plugin.data.region_sources import coco_region
    from deem_plugin.data.regions import compact_region
    from deem_plugin.models.processing import IMAGE_TOKEN

    image = doc["image"].convert("RGB")
    kind = _ABOUT_A_REGION.match(chat.task)[1]
    annotation = {"bbox": doc["bbox"]} if kind == "bbox" else {"segmentation": [list(doc["segmentation"])]}
    name = f"document {chat.doc_id} of {chat.task}"
    (region,) = compact_region(coco_region(annotation), *image.size, name).values()
    prompt = f"{IMAGE_TOKEN}\n{chat.question}\n"
    return Chat(chat.messages, [image], chat.task, chat.doc_id, [region], prompt)


def cut(answer: str, until: list[str]) -> str:
    """Returns the answer up to the first of the stop strings; white space before it begins is no stop."""
    answer = answer.strip()
    for stop in until:
        if stop:
            answer = answer.split(stop, 1)[0]
    return answer.strip()
