"""Makes padded batches of conversations with images."""

import bisect
import logging
import re
from functools import lru_cache
from typing import Any

import torch

from deem_plugin.data.chat import IMAGE_MARK, render_chat, to_parts
from deem_plugin.data.images import load_image

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100  # label of a token that is not learned: what torch's cross entropy skips
Span = tuple[int, int]  # first character and the one after the last


class ConversationCollator:
    """
    Makes a batch of conversations, learning the assistant's answers and nothing else.

    Each conversation is rendered by the chat template (`render_chat`, as in evaluation) and tokenised whole, so that
    every token is the one that the model meets in use; character offsets tell which tokens belong to an answer. An
    answer's labels reach up to and including its end-of-turn token. A template that writes none would teach the model
    never to stop; the end-of-sequence token is added to such answers.

    Args:
        processor (`ProcessorMixin`): Processor of the VLM, with a fast tokenizer.
        max_length (`int`, *optional*):
            Longest conversation in tokens; the end of a longer one is cut off. An image is never cut.
    """

    def __init__(self, processor, max_length: int | None = None):
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.max_length = max_length
        if self.tokenizer.pad_token_id is None:
            raise ValueError(
                f"The tokenizer {type(self.tokenizer).__name__} has no padding token. Set "
                f"`tokenizer.pad_token = tokenizer.eos_token`."
            )
        # Not `all_special_tokens`: Gemma 3's end of turn is special, but is none that its tokenizer has by name.
        self._specials = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        # Conversations come again in every epoch, and rendering a Jinja template costs more than all else here.
        self._render_cached = lru_cache(maxsize=2**15)(self._render)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Collates examples with `messages` (contents with `<image>` marks) and `images` (paths, bytes or pictures).

        Returns:
            `dict`: `input_ids`, `attention_mask` and `labels` of shape `(batch, tokens)`, padded on the right, and
            what the processor makes of the images (`pixel_values`, ...), concatenated over the batch. The first
            example with images comes first.

        Raises:
            ValueError: If images and marks do not agree, an image is unreadable, the template renders an answer
                differently once it is history, or `max_length` leaves no answer or would cut an image.
        """
        # Llama 3.2's image processor takes the device of the first text's first image: there must be one.
        first = next((index for index, example in enumerate(examples) if example.get("images")), 0)
        examples = [examples[first], *examples[:first], *examples[first + 1 :]]
        images = []
        for example in examples:
            marks = sum(message["content"].count(IMAGE_MARK) for message in example["messages"])
            if marks != len(example.get("images") or []):
                raise ValueError(
                    f"A conversation has {marks} {IMAGE_MARK} mark(s) but {len(example.get('images') or [])} "
                    f"image(s): {example['messages'][0]['content'][:80]!r}. Expected as many marks as images."
                )
            # One list for each text: some processors (Gemma 3, SmolVLM, LFM2-VL, Llama 3.2) count them by text.
            images.append([load_image(image) for image in example.get("images") or []])
        rendered = [self._render_cached(_freeze(example["messages"])) for example in examples]
        encoded = self._encode([text for text, _ in rendered], images)

        lengths = [sum(mask) for mask in encoded["attention_mask"]]
        replacements = encoded.pop("text_replacement_offsets", None) or [[]] * len(examples)
        offsets = [row[:length] for row, length in zip(encoded.pop("offset_mapping"), lengths, strict=True)]
        labels = [
            _label(ids, offset, spans, replaced)
            for ids, offset, (_, spans), replaced in zip(
                encoded["input_ids"], offsets, rendered, replacements, strict=True
            )
        ]
        kept = max(self._kept(o, r) for o, r in zip(offsets, replacements, strict=True))
        if all(set(row[:kept]) == {IGNORE_INDEX} for row in labels):
            # The mean over no tokens is NaN, and one such step destroys the weights.
            raise ValueError(
                f"No answer of the batch is left within `data.max_length` = {self.max_length} tokens. Raise it, or "
                f"take conversations with such long questions out of the data."
            )
        return {
            # What is a list has a value for each token, and so has Llama 3.2's `cross_attention_mask`.
            name: torch.as_tensor(value)[:, :kept]
            if isinstance(value, list) or name == "cross_attention_mask"
            else value
            for name, value in {**encoded, "labels": labels}.items()
        }

    def _encode(self, texts: list[str], images: list) -> dict[str, Any]:
        """Tokenises texts and processes images in one call; token lists are padded on the right."""
        # A template that writes the BOS token itself must not get a second one from the tokenizer.
        bos = self.tokenizer.bos_token
        encoded = self.processor(
            text=texts,
            images=images if any(images) else None,
            text_kwargs={
                "add_special_tokens": not (bos and texts[0].startswith(bos)),
                "padding": True,
                "padding_side": "right",
                "return_offsets_mapping": True,
                # Pixtral's and Janus's processors ask for tensors unasked.
                "return_tensors": None,
            },
            images_kwargs={"return_tensors": "pt"},
            return_text_replacement_offsets=True,
        )
        encoded = dict(encoded)
        if any(images) and "text_replacement_offsets" not in encoded:
            # Llama 3.2's processor leaves the text as it is: an image is one token in it.
            encoded["text_replacement_offsets"] = [_unreplaced(text, self.processor.image_token) for text in texts]
        self._check_offsets(texts, encoded)
        return _with_all_rows(encoded, len(texts))

    def _check_offsets(self, texts: list[str], encoded: dict[str, Any]):
        """Raises a `ValueError` if offsets of tokens are missing, or count characters of another text than ours."""
        offsets = encoded.get("offset_mapping")
        replacements = encoded.get("text_replacement_offsets") or [[]] * len(texts)
        for index, (text, replaced) in enumerate(zip(texts, replacements, strict=True)):
            gained = sum(len(item["replacement"]) - len(item["text"]) for item in replaced)
            if offsets is None or max(end for _, end in offsets[index]) > len(text) + gained:
                raise ValueError(
                    f"{type(self.processor).__name__} does not tell where its tokens lie in the text, so the answers "
                    f"cannot be found in it: it gives no offsets, or adds to the text (a BOS token that the chat "
                    f"template does not write). Use a processor with a fast tokenizer, and set `model.chat_template` "
                    f"to a template that writes all of the text. PaliGemma's adds to every text: its models take a "
                    f"prompt, not a conversation, and cannot be trained on one."
                )

    def _render(self, frozen: tuple[tuple[str, str], ...]) -> tuple[str, list[Span]]:
        """Renders a conversation; returns its text and the characters of its answers with their end of turn."""
        messages = [{"role": role, "content": to_parts(content)} for role, content in frozen]
        full = render_chat(self.processor, messages)
        text, spans, done = "", [], 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = render_chat(self.processor, messages[:index], add_generation_prompt=True)
            after = full if index + 1 == len(messages) else render_chat(self.processor, messages[: index + 1])
            if not (full.startswith(before) and full.startswith(after) and len(after) > len(before)):
                raise ValueError(
                    f"The chat template of {type(self.processor).__name__} renders a turn differently when another "
                    f"one follows, so the answers cannot be found in the text. Set `model.chat_template` to a "
                    f"template that writes turns one after the other."
                )
            answer, rest = self._split_at_end_of_turn(full[len(before) : len(after)], frozen[index][1])
            text += full[done : len(before)]
            spans.append((len(text), len(text) + len(answer)))
            text += answer + rest
            done = len(after)
        return text + full[done:], spans

    def _split_at_end_of_turn(self, segment: str, content: str) -> tuple[str, str]:
        """Splits what the template writes for an answer behind its end-of-turn token, adding one if it has none."""
        content = content.split(IMAGE_MARK)[-1].strip()
        # The first occurrence: a short answer, such as "im", may come again within `<|im_end|>`.
        end = max(segment.find(content), 0) + len(content)
        ends = [segment.find(token, end) + len(token) for token in self._specials if token in segment[end:]]
        if ends:
            cut = min(ends)
            return segment[:cut], segment[cut:]
        return segment[:end] + (self.tokenizer.eos_token or ""), segment[end:]

    def _kept(self, offsets: list[Span], replaced: list[dict]) -> int:
        """Returns how many tokens of a conversation are kept under `max_length`."""
        if self.max_length is None or len(offsets) <= self.max_length:
            return len(offsets)
        cut = offsets[self.max_length][0]
        if replaced and replaced[-1]["new_span"][1] > cut:
            needed = sum(end <= replaced[-1]["new_span"][1] for _, end in offsets)
            raise ValueError(
                f"`data.max_length` = {self.max_length} tokens would cut an image out of a conversation: its "
                f"{len(replaced)} image(s) and the text before them take {needed} tokens. Set `data.max_length` "
                f"above that, or use fewer or smaller images."
            )
        return self.max_length


def _freeze(messages: list[dict[str, str]]) -> tuple[tuple[str, str], ...]:
    """Returns messages in a form that can be a key."""
    return tuple((message["role"], message["content"]) for message in messages)


def _with_all_rows(encoded: dict[str, Any], texts: int) -> dict[str, Any]:
    """
    Adds to Llama 3.2's `aspect_ratio_ids` and `aspect_ratio_mask` the rows of the last texts, if these have no image:
    its image processor has such rows in its pixels and between other texts, but forgets them at the end (seen with
    transformers 5.24).
    """
    if "aspect_ratio_ids" in encoded:
        for name in ("aspect_ratio_ids", "aspect_ratio_mask"):
            rows = encoded[name]
            encoded[name] = torch.cat([rows, rows.new_zeros(texts - len(rows), *rows.shape[1:])])
        # As the image processor pads: attention over no tile at all would not be finite.
        encoded["aspect_ratio_mask"][..., 0] = 1
    return encoded


def _unreplaced(text: str, image_token: str) -> list[dict]:
    """Returns where images lie in a text that keeps its image tokens, as processors tell it that replace them."""
    spans = [match.span() for match in re.finditer(re.escape(image_token), text)]
    same = {"text": image_token, "replacement": image_token}
    return [{"span": span, "new_span": span, **same} for span in spans]


def _label(ids: list[int], offsets: list[Span], spans: list[Span], replaced: list[dict]) -> list[int]:
    """Returns the labels of one conversation: its ids within the answers, `IGNORE_INDEX` elsewhere and on images."""
    labels = [IGNORE_INDEX] * len(ids)  # `ids` may be padded, `offsets` are not
    # `spans` count characters of the text as rendered, `offsets` those of the text with its image tokens expanded.
    ends = [item["span"][1] for item in replaced]
    gained = [0] + [item["new_span"][1] - item["span"][1] for item in replaced]
    image_spans = [item["new_span"] for item in replaced]
    starts = [start for start, _ in offsets]
    for span in spans:
        first, last = (place + gained[bisect.bisect_right(ends, place)] for place in span)
        for index in range(bisect.bisect_left(starts, first), len(offsets)):
            start, end = offsets[index]
            if start >= last:
                break
            if start < end and not any(a <= start < b for a, b in image_spans):
                labels[index] = ids[index]
    return labels
