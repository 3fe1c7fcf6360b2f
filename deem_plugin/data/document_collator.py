"""Makes batches of interleaved documents, packed into rows."""

import logging
from typing import Any

import numpy as np
import torch

from deem_plugin.data.collator import IGNORE_INDEX
from deem_plugin.data.images import load_image

logger = logging.getLogger(__name__)


class DocumentCollator:
    """
    Packs the documents of a batch into as few rows as their order allows.

    A document is `bos` (where the language model has one), its parts, and `eos`; a picture is its start and its
    slots. Nothing is learned of a document's first token, of image slots, and of parts before `learn_from`. A document
    longer than a row loses its last parts, which is counted in `cut_parts` and said once.

    Args:
        processor (`DeemProcessor`): Of the model.
        max_length (`int`, *optional*): Tokens of a row, 2048 in the paper; by default the longest document of a batch.
    """

    def __init__(self, processor, max_length: int | None = None):
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.max_length = max_length
        self.cut_parts = 0
        if max_length is not None and max_length < processor.num_image_tokens + 3:
            raise ValueError(
                f"`data.max_length` = {max_length} holds no picture, which takes {processor.num_image_tokens + 1} "
                f"tokens, beside the first and last token. Raise it, 2048 is the paper's."
            )

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Collates examples with `parts` and `learn_from`, as `load_documents` returns them.

        Returns:
            `dict`: `input_ids`, `attention_mask`, `labels` and `document_ids` of shape `(rows, tokens)`, padded on the
            right, and where there are pictures `pixel_values` `(images, 3, size, size)` and what else the image
            processor returns; `region_masks` `(images, 1, size, size)` where there are regions.

        Raises:
            ValueError: If a picture or mask is unreadable, or a region lies outside of its picture.
        """
        documents = [self._tokenize(example) for example in examples]
        batch = self._rows([document[:2] for document in documents])
        parts = [part for document in documents for part in document[2]]
        if parts:
            images, regions = self.processor.show_regions(
                [load_image(part["image"]) for part in parts], [_region(part) for part in parts]
            )
            batch |= dict(self.processor.image_processor(images, return_tensors="pt"))
            if any(region is not None for region in regions):
                batch["region_masks"] = self.processor.region_masks(images, regions)
        return batch

    def _tokenize(self, example) -> tuple[list[int], list[int], list[dict]]:
        """Returns ids and labels of a document, and its pictures."""
        start, slot = self.processor.image_start_token_id, self.processor.image_token_id
        begin = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        end = [self.tokenizer.eos_token_id]
        room = None if self.max_length is None else self.max_length - len(begin) - len(end)
        ids, labels, pictures = list(begin), [IGNORE_INDEX] * len(begin), []
        for number, part in enumerate(example["parts"]):
            if part["image"] is not None:
                tokens = [start] + [slot] * self.processor.num_image_tokens
                targets = [start] + [IGNORE_INDEX] * self.processor.num_image_tokens
            else:
                tokens = targets = self.tokenizer(part["text"], add_special_tokens=False)["input_ids"]
            if room is not None and len(ids) - len(begin) + len(tokens) > room:
                self._note_cut(len(example["parts"]) - number)
                break
            # Nothing could tell that a document begins with this very token.
            learned = number >= example["learn_from"]
            ids += tokens
            labels += targets if learned else [IGNORE_INDEX] * len(tokens)
            pictures += [part] if part["image"] is not None else []
        else:
            ids, labels = ids + end, labels + end
        if pictures and ids[len(begin)] == start:
            labels[len(begin)] = IGNORE_INDEX
        labels[0] = IGNORE_INDEX
        return ids, labels, pictures

    def _note_cut(self, count: int) -> None:
        if not self.cut_parts:
            logger.warning(
                "A document has more than `data.max_length` = %d tokens: its last %d part(s) are left out, and so are "
                "those of later ones; `DocumentCollator.cut_parts` counts them.",
                self.max_length,
                count,
            )
        self.cut_parts += count

    def _rows(self, documents: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        """Packs documents one after the other, a new row where one does not fit any more, and pads the rows."""
        longest = self.max_length or max(len(ids) for ids, _ in documents)
        rows: list[list[tuple[list[int], list[int]]]] = [[]]
        for document in documents:
            if rows[-1] and sum(len(ids) for ids, _ in rows[-1]) + len(document[0]) > longest:
                rows.append([])
            rows[-1].append(document)
        width = max(sum(len(ids) for ids, _ in row) for row in rows)
        fill = {
            "input_ids": self.tokenizer.pad_token_id or 0,
            "attention_mask": 0,
            "labels": IGNORE_INDEX,
            "document_ids": -1,
        }
        batch = {name: torch.full((len(rows), width), value) for name, value in fill.items()}
        for index, row in enumerate(rows):
            place = 0
            for number, (ids, labels) in enumerate(row):
                here = slice(place, place + len(ids))
                batch["input_ids"][index, here] = torch.tensor(ids)
                batch["labels"][index, here] = torch.tensor(labels)
                batch["attention_mask"][index, here] = 1
                batch["document_ids"][index, here] = number
                place += len(ids)
        return batch


def _region(part):
    """Returns the region of a picture part as `region_mask` takes it; `None` for the whole picture."""
    if part["mask"] is not None:
        return np.asarray(load_image(part["mask"])).any(-1)
    return part["box"] if part["box"] is not None else part["points"]
