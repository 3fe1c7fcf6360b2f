"""Answers that are pictures, as lmms-eval's text-to-image tasks and its tasks with a drawn step take them."""

import json
import re
from dataclasses import replace
from pathlib import Path

from PIL import Image

from deem_plugin.evaluation.chats import Chat
from deem_plugin.models import DeemForConditionalGeneration

_WISH, _QUESTION = (re.compile(rf"\[{tag}\](.*?)\[/{tag}\]", re.DOTALL) for tag in ("GEN_PROMPT", "QUESTION"))


def give_diffusion_model(model, path: str, dtype: str) -> None:
    """
    Gives an interleaved model the diffusion model that it draws with.

    Args:
        model (`PreTrainedModel`): The model that is evaluated.
        path (`str`): Folder or hub id of the diffusion model.
        dtype (`str`): Precision of its denoiser.

    Raises:
        ValueError: If the model cannot draw.
    """
    from deem_plugin.feedback.diffusion_model import load_diffusion_model

    if not isinstance(model, DeemForConditionalGeneration):
        raise ValueError(
            f"diffusion_model={path} is for the interleaved model, which draws; this is a {type(model).__name__}. "
            f"Leave `diffusion_model` out."
        )
    model.attach_diffusion_model(load_diffusion_model(path, dtype))


def keep_drawing(chat: Chat, picture: Image.Image, folder: Path) -> str:
    """Saves a picture by task and document, and returns the answer that lmms-eval's text-to-image tasks read."""
    path = folder / chat.task / f"{chat.doc_id:06d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return json.dumps({"text": "", "images": [str(path.absolute())]})


def split_wish(chat: Chat) -> tuple[Chat, Chat]:
    """
    Splits the prompt of a task with a drawn step: what is to be drawn, and what is then asked.

    They stand in `[GEN_PROMPT]...[/GEN_PROMPT]` and `[QUESTION]...[/QUESTION]`; where a tag is missing, the whole
    prompt counts.
    """
    found = (tag.search(chat.question) for tag in (_WISH, _QUESTION))
    wish, question = (chat.question if match is None else match[1].strip() for match in found)
    return _ask(chat, wish, chat.images), _ask(chat, question, chat.images)


def with_drawing(chat: Chat, picture: Image.Image) -> Chat:
    """Returns a chat with a drawn picture behind its own ones."""
    return _ask(chat, chat.question, [*chat.images, picture])


def _ask(chat: Chat, text: str, images: list[Image.Image]) -> Chat:
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    return replace(chat, messages=[{"role": "user", "content": content}], images=images, regions=[None] * len(images))
