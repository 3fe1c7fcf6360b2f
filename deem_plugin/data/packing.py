"""Packs tokenised documents into rows of the context length, without ever cutting through a picture."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

PADDING_DOCUMENT = -1


@dataclass
class TokenDocument:
    """
    A document as tokens.

    Args:
        input_ids (`list[int]`): Tokens; each picture is an image start followed by its slots.
        images (`list`): The pictures, in whatever form, in reading order.
    """

    input_ids: list[int]
    images: list[Any]


@dataclass
class PackedRow:
    """
    A row of packed documents.

    Args:
        input_ids (`list[int]`): Tokens, padded on the right to the context length.
        document_ids (`list[int]`): For each token its document's number in the row, from 0; -1 for padding.
        images (`list`): The pictures of all documents of the row, in reading order.
    """

    input_ids: list[int]
    document_ids: list[int]
    images: list[Any]


class Packer:
    """
    Fills rows greedily and in order.

    A document that does not fit into what is left of a row begins the next row. One that is longer than a whole row is
    cut at its end: text at any token, a picture never, so that its image start and slots stay or go together.

    Args:
        length (`int`): Context length in tokens.
        image_token_id (`int`): Id of an image slot.
        image_start_token_id (`int`): Id of the token before the slots of a picture.
        pad_token_id (`int`): Id of padding.

    Attributes:
        counts (`Counter`): `documents`, `rows`, `padding tokens`, and of what was cut `cut documents`, `cut tokens`
            and `cut images`; documents of which a cut leaves nothing are counted as `dropped documents`.
    """

    def __init__(self, length: int, *, image_token_id: int, image_start_token_id: int, pad_token_id: int):
        if length < 1:
            raise ValueError(f"`length` is {length}; expected a context length of at least one token.")
        self.length = length
        self.image_token_id = image_token_id
        self.image_start_token_id = image_start_token_id
        self.pad_token_id = pad_token_id
        self.counts: Counter[str] = Counter()

    def pack(self, documents: Iterable[TokenDocument]) -> Iterator[PackedRow]:
        """
        Yields the rows of `documents`, the last one too.

        Raises:
            ValueError: If a document is empty, or its pictures and its image starts with slots do not match.
        """
        row: list[TokenDocument] = []
        used = 0
        for number, document in enumerate(documents):
            self.counts["documents"] += 1
            document = self._fit(document, number)
            if not document.input_ids:
                self.counts["dropped documents"] += 1
                continue
            if used + len(document.input_ids) > self.length:
                yield self._close(row)
                row, used = [], 0
            row.append(document)
            used += len(document.input_ids)
        if row:
            yield self._close(row)

    def _fit(self, document: TokenDocument, number: int) -> TokenDocument:
        """Checks a document and cuts it to the context length if it is longer."""
        ids = document.input_ids
        pictures = self._pictures(ids, number)
        if not ids:
            raise ValueError(f"Document {number} has no tokens. Leave it out before packing.")
        if len(pictures) != len(document.images):
            raise ValueError(
                f"Document {number} has {len(pictures)} image start(s) with slots, but brings {len(document.images)} "
                f"picture(s); expected one for each."
            )
        if len(ids) <= self.length:
            return document
        end = next((start for start, stop in pictures if start < self.length < stop), self.length)
        kept = sum(stop <= end for _, stop in pictures)
        self.counts["cut documents"] += 1
        self.counts["cut tokens"] += len(ids) - end
        self.counts["cut images"] += len(pictures) - kept
        return TokenDocument(ids[:end], document.images[:kept])

    def _pictures(self, ids: list[int], number: int) -> list[tuple[int, int]]:
        """Returns where each picture's image start stands and where its slots end."""
        spans, place = [], 0
        while place < len(ids):
            if ids[place] not in (self.image_token_id, self.image_start_token_id):
                place += 1
                continue
            start, place = place, place + 1
            while place < len(ids) and ids[place] == self.image_token_id:
                place += 1
            if ids[start] == self.image_token_id or place == start + 1:
                what = "an image slot without" if ids[start] == self.image_token_id else "no image slot behind"
                raise ValueError(
                    f"Document {number} has {what} an image start at token {start}; expected each picture as an image "
                    f"start (id {self.image_start_token_id}) followed by its slots (id {self.image_token_id})."
                )
            spans.append((start, place))
        return spans

    def _close(self, row: list[TokenDocument]) -> PackedRow:
        input_ids = [token for document in row for token in document.input_ids]
        document_ids = [number for number, document in enumerate(row) for _ in document.input_ids]
        padding = self.length - len(input_ids)
        self.counts["rows"] += 1
        self.counts["padding tokens"] += padding
        return PackedRow(
            input_ids + [self.pad_token_id] * padding,
            document_ids + [PADDING_DOCUMENT] * padding,
            [image for document in row for image in document.images],
        )
