"""Makes batches of interleaved documents, packed into rows."""

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from deem_plugin.data.chat import as_text
from deem_plugin.data.collator import IGNORE_INDEX
from deem_plugin.data.images import load_image
from deem_plugin.data.parts import region_of
from deem_plugin.data.tokens import Span, end_of_sequence, per_token, tokenize


class DocumentCollator:
    """
    Packs the documents of a batch into as few rows as their order allows.

    A document is tokenised whole, as the processor does in use, with the end-of-sequence token behind it. Nothing is
    learned of image slots, of parts before `learn_from`, of a document's first token, and of an image start with which
    it begins: nothing could tell of these two. A document longer than a row loses its end, and a picture that would be
    cut with it; `cut` counts such documents.

    Args:
        processor (`DeemProcessor`): Of the model.
        max_length (`int`, *optional*): Tokens of a row, 2048 in the paper; by default the longest document of a batch.
    """

    def __init__(self, processor, max_length: int | None = None):
        self.processor = processor
        self.max_length = max_length
        self.cut = 0
        if max_length is not None and max_length < processor.num_image_tokens + 3:
            raise ValueError(
                f"`data.max_length` = {max_length} holds no picture, which takes {processor.num_image_tokens + 1} "
                f"tokens, beside the first and last token. Raise it, 2048 is the paper's."
            )

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Collates examples with `parts` and `learn_from`, as the readers of documents, shards and regions give them.

        Returns:
            `dict`: `input_ids`, `attention_mask`, `labels` and `document_ids` of shape `(rows, tokens)`, padded on the
            right, and where there are pictures `pixel_values` `(images, 3, size, size)` and what else the image
            processor returns; `region_masks` `(images, 1, size, size)` where there are regions.

        Raises:
            ValueError: If a picture or mask is unreadable, or a region lies outside of its picture.
        """
        pictures = [[part for part in example["parts"] if part["image"] is not None] for example in examples]
        texts, spans = zip(*map(self._write, examples), strict=True)
        inputs, tokens = tokenize(
            self.processor,
            texts,
            [[load_image(part["image"]) for part in own] for own in pictures],
            spans,
            regions=[[region_of(part) for part in own] for own in pictures],
        )
        documents, kept = [], []
        ids, lengths = inputs.pop("input_ids"), inputs.pop("attention_mask").sum(1).tolist()
        for row, length, (learned, *shown) in zip(ids, lengths, tokens, strict=True):
            end = self._end(length, shown)
            labels = torch.full_like(row, IGNORE_INDEX)
            labels[learned] = row[learned]
            labels[[slot for _, *slots in shown for slot in slots]] = IGNORE_INDEX
            labels[0] = IGNORE_INDEX
            documents.append((row[:end], labels[:end]))
            kept += [positions[-1] < end for positions in shown]
        names = set(inputs) - set(per_token(inputs)) if any(kept) else ()
        return self._rows(documents) | {name: inputs[name][torch.tensor(kept)] for name in names}

    def _write(self, example: dict[str, Any]) -> tuple[str, list[Span]]:
        """Returns the text of a document; the span that is learned, and those of its pictures' marks."""
        mark, text, begin, marks = self.processor.image_token, "", 0, []
        for number, part in enumerate(example["parts"]):
            if number == example["learn_from"]:
                begin = len(text.rstrip(" "))  # a space before what is learned is joined with it, as in `render_chat`
            if part["image"] is None:
                text += as_text(self.processor, part["text"])
            else:
                marks.append((len(text), len(text) + len(mark)))
                text += mark
        if marks and marks[0][0] == 0:
            begin = max(begin, len(mark))
        text += end_of_sequence(self.processor.tokenizer)
        return text, [(begin, len(text)), *marks]

    def _end(self, length: int, shown: list[list[int]]) -> int:
        """Returns how many tokens of a document are kept under `max_length`."""
        if self.max_length is None or length <= self.max_length:
            return length
        self.cut += 1
        cut = (own[0] for own in shown if own[0] < self.max_length <= own[-1])
        return next(cut, self.max_length)

    def _rows(self, documents: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Packs documents one after the other, a new row where one does not fit any more, and pads the rows."""
        longest = self.max_length or max(len(ids) for ids, _ in documents)
        rows: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[]]
        for document in documents:
            if rows[-1] and sum(len(ids) for ids, _ in rows[-1]) + len(document[0]) > longest:
                rows.append([])
            rows[-1].append(document)
        columns = {
            "input_ids": ([[ids for ids, _ in row] for row in rows], self.processor.tokenizer.pad_token_id),
            "labels": ([[labels for _, labels in row] for row in rows], IGNORE_INDEX),
            "attention_mask": ([[torch.ones_like(ids) for ids, _ in row] for row in rows], 0),
            "document_ids": ([[torch.full_like(ids, n) for n, (ids, _) in enumerate(row)] for row in rows], -1),
        }
        return {
            name: pad_sequence([torch.cat(row) for row in values], batch_first=True, padding_value=fill)
            for name, (values, fill) in columns.items()
        }
