"""Makes padded batches of conversations with images."""

from typing import Any

import torch

from deem_plugin.data.chat import IMAGE_MARK, as_text, render_chat, to_parts
from deem_plugin.data.images import load_image
from deem_plugin.data.tokens import Span, end_of_sequence, image_spans, per_token, tokenize

IGNORE_INDEX = -100  # label of a token that is not learned: what torch's cross entropy skips


class ConversationCollator:
    """
    Makes a batch of conversations, learning the assistant's answers and nothing else.

    Each conversation is rendered by the chat template (`render_chat`, as in evaluation) and tokenised whole, so that
    every token is the one that the model meets in use. An answer's labels reach up to and including its end-of-turn
    token. A template that writes none would teach the model never to stop; the end-of-sequence token is added to such
    answers.

    Args:
        processor (`ProcessorMixin`): Processor of the VLM, with a fast tokenizer.
        max_length (`int`, *optional*):
            Longest conversation in tokens; the end of a longer one is cut off, and if that would cut an image, all
            from the message on that shows it. `cut` counts such conversations.
    """

    def __init__(self, processor, max_length: int | None = None):
        self.processor = processor
        self.max_length = max_length
        self.cut = 0
        # Not `all_special_tokens`: Gemma 3's end of turn is special, but is none that its tokenizer has by name.
        added = processor.tokenizer.added_tokens_decoder.values()
        self._specials = [str(token) for token in added if token.special]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Collates examples with `messages` (contents with `<image>` marks) and `images` (paths, bytes or pictures).

        Returns:
            `dict`: `input_ids`, `attention_mask` and `labels` of shape `(batch, tokens)`, padded on the right, and
            what the processor makes of the images (`pixel_values`, ...), concatenated over the batch. The first
            example with images comes first.

        Raises:
            ValueError: If images and marks do not agree, an image is unreadable, the template does not write an answer
                as it is or renders it differently once it is history, or `max_length` leaves no answer or has no room
                for the images of a first question.
        """
        # Llama 3.2's image processor takes the device of the first text's first image: there must be one.
        first = next((index for index, example in enumerate(examples) if example.get("images")), 0)
        examples = [examples[first], *examples[:first], *examples[first + 1 :]]
        # One list for each text: some processors (Gemma 3, SmolVLM, LFM2-VL, Llama 3.2) count images by text.
        images = [[load_image(image) for image in _checked_images(example)] for example in examples]
        texts, answers = zip(*(self._render(example["messages"]) for example in examples), strict=True)
        pictures = [image_spans(self.processor, text) for text in texts]
        spans = [[*own, *shown] for own, shown in zip(answers, pictures, strict=True)]
        inputs, tokens = tokenize(self.processor, texts, images, spans)
        shown = [own[len(spans) :] for own, spans in zip(tokens, answers, strict=True)]

        cut = [self._before_a_cut_image(example, own) for example, own in zip(examples, shown, strict=True)]
        count = self.cut
        if self.max_length is not None:
            count += int(inputs["attention_mask"][:, self.max_length :].any(1).sum())
        if any(one is not other for one, other in zip(cut, examples, strict=True)):
            batch, self.cut = self(cut), count
            return batch
        self.cut = count
        labels = torch.full_like(inputs["input_ids"], IGNORE_INDEX)
        for row, own in enumerate(tokens):
            learned = [index for positions in own[: len(answers[row])] for index in positions]
            labels[row, learned] = inputs["input_ids"][row, learned]
            labels[row, [index for positions in shown[row] for index in positions]] = IGNORE_INDEX
        batch = {**inputs, "labels": labels}
        for name in [*per_token(inputs), "labels"]:
            batch[name] = batch[name][:, : self.max_length]
        if (batch["labels"] == IGNORE_INDEX).all():
            # The mean over no tokens is NaN, and one such step destroys the weights.
            raise ValueError(
                f"No answer of the batch is left within `data.max_length` = {self.max_length} tokens. Raise it, or "
                f"take conversations with such long questions out of the data."
            )
        return batch

    def _before_a_cut_image(self, example: dict[str, Any], shown: list[list[int]]) -> dict[str, Any]:
        """Returns an example as it is if its images end within `max_length`, else without its end from one on."""
        cut = [index for index, positions in enumerate(shown) if self.max_length and positions[-1] >= self.max_length]
        if not cut:
            return example
        kept, count = [], 0
        for message in example["messages"]:
            count += message["content"].count(IMAGE_MARK)
            if count > cut[0]:
                break
            kept.append(message)
        if all(message["role"] != "assistant" for message in kept):
            raise ValueError(
                f"`data.max_length` = {self.max_length} tokens would cut an image out of a conversation: its first "
                f"{cut[0] + 1} image(s) and the text before them take {shown[cut[0]][-1] + 1} tokens. Set "
                f"`data.max_length` above that, or use fewer or smaller images."
            )
        left = sum(message["content"].count(IMAGE_MARK) for message in kept)
        return {"messages": kept, "images": example["images"][:left]}

    def _render(self, messages: list[dict[str, str]]) -> tuple[str, list[Span]]:
        """Renders a conversation; returns its text and the characters of its answers with their end of turn."""
        parts = [{"role": message["role"], "content": to_parts(message["content"])} for message in messages]
        full = render_chat(self.processor, parts)
        text, spans, done = "", [], 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = render_chat(self.processor, parts[:index], add_generation_prompt=True)
            after = full if index + 1 == len(parts) else render_chat(self.processor, parts[: index + 1])
            if not (full.startswith(before) and full.startswith(after) and len(after) > len(before)):
                raise ValueError(
                    f"The {self._template} renders a turn differently when another one follows, so the answers cannot "
                    f"be found in the text. Set `model.chat_template` to a template that writes turns one after the "
                    f"other."
                )
            answer, rest = self._split_at_end_of_turn(full[len(before) : len(after)], message["content"])
            text += full[done : len(before)]
            spans.append((len(text), len(text) + len(answer)))
            text += answer + rest
            done = len(after)
        return text + full[done:], spans

    def _split_at_end_of_turn(self, segment: str, content: str) -> tuple[str, str]:
        """Splits what the template writes for an answer behind its end-of-turn token, adding one if it has none."""
        end = 0
        for piece in content.split(IMAGE_MARK):
            piece = as_text(self.processor, piece).strip()
            # The first occurrence: a short answer, such as "im", may come again within `<|im_end|>`.
            start = segment.find(piece, end)
            if start < 0:
                raise ValueError(
                    f"The {self._template} does not write the answer {content[:80]!r} as it is, but {segment[:80]!r}: "
                    f"the model would learn another answer than that of the data. Set `model.chat_template` to a "
                    f"template that writes answers unchanged."
                )
            end = start + len(piece)
        ends = [segment.find(token, end) + len(token) for token in self._specials if token in segment[end:]]
        if ends:
            cut = min(ends)
            return segment[:cut], segment[cut:]
        return segment[:end] + end_of_sequence(self.processor.tokenizer), segment[end:]

    @property
    def _template(self) -> str:
        template = self.processor.chat_template or self.processor.tokenizer.chat_template
        return f"chat template of {type(self.processor).__name__} ({' '.join(str(template).split())[:60]!r}...)"


def _checked_images(example: dict[str, Any]) -> list:
    """Returns the images of an example, or raises a `ValueError` if there are not as many as marks."""
    images = example.get("images") or []
    marks = sum(message["content"].count(IMAGE_MARK) for message in example["messages"])
    if marks != len(images):
        raise ValueError(
            f"A conversation has {marks} {IMAGE_MARK} mark(s) but {len(images)} image(s): "
            f"{example['messages'][0]['content'][:80]!r}. Expected as many marks as images."
        )
    return images
