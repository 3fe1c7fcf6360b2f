"""Renders conversations to prompt text, in one way for training and for evaluation."""

import inspect
from typing import Any

# LLaVA's mark for "an image belongs here", used in the text of stored conversations.
IMAGE_MARK = "<image>"


def to_parts(text: str) -> list[dict[str, str]]:
    """Splits `"<image>\\nWhat is this?"` into chat content parts, one `{"type": "image"}` for each mark."""
    parts: list[dict[str, str]] = []
    pieces = text.split(IMAGE_MARK)
    for index, piece in enumerate(pieces):
        if index:
            parts.append({"type": "image"})
        # LLaVA's data puts a line break around each mark; chat templates write their own.
        if piece := piece.strip("\n"):
            parts.append({"type": "text", "text": piece})
    return parts


def as_text(processor, text: str) -> str:
    """
    Returns `text` with a blank in whatever means something of its own to processor or tokenizer, such as what stands
    for an image, or begins or ends a sequence: `< image>`.
    """
    for name, token in [*vars(processor).items(), *processor.tokenizer.special_tokens_map.items()]:
        if name.endswith("_token") and isinstance(token, str) and len(token) > 1:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def render_chat(processor, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
    """
    Renders chat messages as the prompt text that `tokenize` takes.

    A processor's own chat template gets the content parts as they are. Where there is only the language model's, which
    knows contents as strings, the parts are joined around the processor's image token first. PaliGemma's models know
    no roles: without a template, their prompts are the images and the texts. What looks like a mark in a text is text,
    see `as_text`.

    Args:
        processor (`ProcessorMixin`): Processor of the VLM.
        messages (`list[dict]`): `{"role": ..., "content": ...}`; content is a string or a list of parts.
        add_generation_prompt (`bool`):
            Whether the text ends where the assistant begins to answer. It ends in no space then: tokenizers join one
            with the word that follows, in training as in use.

    Raises:
        ValueError: If neither the processor nor its tokenizer has a chat template, or PaliGemma is asked twice.
    """
    messages = [{**message, "content": _as_text(processor, message["content"])} for message in messages]
    if getattr(processor, "chat_template", None):
        text = processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    elif takes_suffix(processor) and not processor.tokenizer.chat_template:
        if sum(message["role"] == "user" for message in messages) > 1:
            raise ValueError(
                f"The models of {type(processor).__name__} answer one prompt and know no conversation, but there are "
                f"several questions. Leave such conversations out, or set `model.chat_template` to a Jinja file."
            )
        parts = [part for message in messages for part in message["content"]]
        marks = processor.image_token * sum(part["type"] == "image" for part in parts)
        return marks + "".join(part["text"] for part in parts if part["type"] == "text")
    else:
        text = _render_strings(processor, messages, add_generation_prompt)
    return text.rstrip(" ") if add_generation_prompt else text


def takes_suffix(processor) -> bool:
    """Tells whether a processor takes an answer beside the prompt and writes what stands between, as PaliGemma's."""
    return "suffix" in inspect.signature(type(processor).__call__).parameters


def _as_text(processor, content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return as_text(processor, content)
    return [{**part, "text": as_text(processor, part["text"])} if part["type"] == "text" else part for part in content]


def _render_strings(processor, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    from deem_plugin.vision.processors import join_parts

    tokenizer = processor.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"Neither {type(processor).__name__} nor its tokenizer has a chat template, so conversations cannot be "
            f"rendered. Set `model.chat_template` in the recipe to a Jinja file, or use a chat-tuned checkpoint."
        )
    template = join_parts(tokenizer.chat_template, processor.image_token)
    return tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=add_generation_prompt, tokenize=False
    )
