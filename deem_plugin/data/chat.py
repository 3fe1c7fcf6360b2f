"""Renders conversations to prompt text, in one way for training and for evaluation."""

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


def render_chat(processor, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
    """
    Renders chat messages as the prompt text that `processor(text=..., images=...)` takes.

    A processor's own chat template gets the content parts as they are. Where there is only the language model's, which
    knows contents as strings, the parts are joined around the processor's image token first.

    Args:
        processor (`ProcessorMixin`): Processor of the VLM.
        messages (`list[dict]`): `{"role": ..., "content": ...}`; content is a string or a list of parts.
        add_generation_prompt (`bool`): Whether the text ends where the assistant begins to answer.

    Raises:
        ValueError: If neither the processor nor its tokenizer has a chat template.
    """
    if getattr(processor, "chat_template", None):
        return processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    tokenizer = processor.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"Neither {type(processor).__name__} nor its tokenizer has a chat template, so conversations cannot be "
            f"rendered. Set `model.chat_template` in the recipe to a Jinja file, or use a chat-tuned checkpoint."
        )
    from deem_plugin.vision.processors import join_parts

    template = join_parts(tokenizer.chat_template, processor.image_token)
    return tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=add_generation_prompt, tokenize=False
    )
