"""What a request asks of the model: chat messages with their pictures, or regions of pictures."""

import hashlib
import pickle
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from PIL import Image

from deem_plugin.data.chat import as_text, render_chat
from deem_plugin.data.images import load_image


@dataclass
class Chat:
    """
    One prompt.

    Args:
        messages (`list[dict]`): With a mark for each image, as `render_chat` takes them.
        images (`list[PIL.Image.Image]`): The images in the order of their marks.
        task, doc_id (`str` and `int`): Of which task and document it is.
        regions (`list`): For each image the region that is meant of it, or `None` for all of it.
    """

    messages: list[dict]
    images: list[Image.Image]
    task: str
    doc_id: int
    regions: list[Any]

    @property
    def about_regions(self) -> bool:
        """Whether a region is meant of any image."""
        return any(region is not None for region in self.regions)

    @cached_property
    def pictures(self) -> bytes:
        """A fingerprint of the images and their regions; of the prompt where there are none."""
        content = hashlib.blake2b(digest_size=16)
        for image, region in zip(self.images, self.regions, strict=True):
            content.update(pickle.dumps((image.mode, image.size, region)) + image.tobytes())
        if not self.images:
            content.update(pickle.dumps(self.messages))
        return content.digest()

    @property
    def question(self) -> str:
        """The text of the last message."""
        return "\n".join(part["text"] for part in self.messages[-1]["content"] if part["type"] == "text")

    def render(self, processor) -> str:
        """
        Returns the prompt as text.

        By the chat template, and begun with the last message where it is the assistant's. A prompt about regions is a
        document, as the model has learned them.
        """
        if self.about_regions:
            return self.as_document(processor)
        if self.messages[-1]["role"] != "assistant":
            return render_chat(processor, self.messages, add_generation_prompt=True)
        text = render_chat(processor, self.messages)
        # As templates may write it; at its end a space would be joined with the word that follows.
        begun = as_text(processor, self.messages[-1]["content"][-1]["text"]).strip()
        return text[: text.rindex(begun) + len(begun)]

    def as_document(self, processor) -> str:
        """Returns the texts with marks for pictures, without a template."""
        texts = [
            "".join(
                processor.image_token if part["type"] == "image" else as_text(processor, part["text"])
                for part in message["content"]
            )
            for message in self.messages
        ]
        return "\n".join(texts)


def read_messages(messages: list[dict], task: str, doc_id: int) -> Chat:
    """
    Makes a chat of lmms-eval's messages.

    Args:
        messages (`list[dict]`): An image part may have a `region` in the pixels of its picture, see `region_mask`.
        task, doc_id (`str` and `int`): Of which task and document they are.

    Raises:
        ValueError: If a part is neither text nor image.
    """
    images, regions, plain = [], [], []
    for message in messages:
        content = message["content"]
        parts = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                parts.append({"type": "text", "text": part["text"]})
            elif part["type"] == "image":
                images.append(load_image(part["url"]))  # as in training
                regions.append(part.get("region"))
                parts.append({"type": "image"})
            else:
                raise ValueError(f"A task hands over {part['type']!r}; the model `deem` takes text and images only.")
        plain.append({"role": message["role"], "content": parts})
    return Chat(plain, images, task, doc_id, regions)


def cut(answer: str, until: list[str]) -> str:
    """Returns the answer up to the first of the stop strings; white space before it begins is no stop."""
    begin = len(answer) - len(answer.lstrip())
    ends = [answer.find(stop, begin) for stop in until if stop]
    return answer[: min((end for end in ends if end >= 0), default=len(answer))]
