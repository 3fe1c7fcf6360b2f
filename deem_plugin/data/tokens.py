"""Turns texts with images into tokens, in one way for training, for prompts and for scoring."""

import bisect
import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import BatchFeature

from deem_plugin.data.chat import takes_suffix

Span = tuple[int, int]  # first character and the one after the last


def tokenize(
    processor,
    texts: Sequence[str],
    images: Sequence[list],
    spans: Sequence[Sequence[Span]] | None = None,
    *,
    regions: Sequence[list] | None = None,
    padding_side: str = "right",
) -> tuple[BatchFeature, list[list[list[int]]]]:
    """
    Tokenizes each text whole, by one call of the processor, and tells which tokens spans of it became.

    The beginning-of-sequence token comes as the processor has it, but not from the tokenizer where the first text
    begins with it. Nothing is written behind a text: what a model learns to end with stands in the text, and a prompt
    goes on. A tokenizer without a padding token is given its end-of-sequence token as one; attention never sees it.

    Args:
        processor (`ProcessorMixin`): Of the model.
        texts (`Sequence[str]`): With the processor's mark for each image, see `image_spans`.
        images (`Sequence[list]`): For each text its images, in the order of their marks.
        spans (`Sequence[Sequence[tuple[int, int]]]`, *optional*):
            For each text the spans in question, in characters of the text as given.
        regions (`Sequence[list]`, *optional*):
            For each text the regions that are meant of its images, `None` for a whole one; for a [`DeemProcessor`].
        padding_side (`str`): `"right"` or `"left"`.

    Returns:
        `tuple[BatchFeature, list]`: What the model takes, `input_ids` of shape `(texts, tokens)` among it; and
        `tokens[i][j]`, the positions in row `i` of every token that overlaps its span `j`. A token that merges the
        beginning of a span with what stands before is of the span; the tokens of an image are of its mark.

    Raises:
        ValueError: If there are spans, and the processor does not tell where its tokens lie in the text.
    """
    spans = [[] for _ in texts] if spans is None else spans
    prompts, suffixes = list(texts), None
    if any(spans) and takes_suffix(processor):
        prompts, suffixes = _split_suffixes(processor, texts, spans)
    encoded = _process(processor, prompts, suffixes, images, regions, padding_side)
    encoded.pop("labels", None)  # PaliGemma's
    offsets, special = (encoded.pop(name, None) for name in ("offset_mapping", "special_tokens_mask"))
    replaced = encoded.pop("text_replacement_offsets", None) or [[] for _ in texts]
    if any(images) and not any(replaced):
        # Llama 3.2's processor leaves the text as it is: an image is one token in it.
        replaced = [[{"span": mark, "new_span": mark} for mark in image_spans(processor, text)] for text in prompts]

    tokens: list[list[list[int]]] = [[[] for _ in own] for own in spans]
    if any(spans):
        _check_offsets(processor, prompts, offsets, replaced, appends=suffixes is not None)
    for row, (text, own) in enumerate(zip(texts, spans, strict=True)):
        written = [] if special is None else [index for index, added in enumerate(special[row]) if not added]
        if not written:
            continue
        suffix = []
        if suffixes is not None:
            suffix = [index for index in written if encoded["token_type_ids"][row][index]]
            written = written[: -len(suffix)]
            if not text.endswith(processor.tokenizer.eos_token):
                del suffix[-1]  # the processor writes it unasked
        tokens[row] = [
            suffix if suffix and span[1] == len(text) else _overlapping(span, offsets[row], written, replaced[row])
            for span in own
        ]
        for index in range(max([*written, *suffix]) + 1, len(special[row])):
            encoded["input_ids"][row][index] = processor.tokenizer.pad_token_id
            encoded["attention_mask"][row][index] = 0
    inputs = {name: torch.as_tensor(value) for name, value in encoded.items()}
    filled = inputs["attention_mask"].any(0).nonzero()
    for name in per_token(inputs):
        inputs[name] = inputs[name][:, : int(filled[-1]) + 1]
    return BatchFeature(_with_all_rows(inputs, len(texts))), tokens


def _process(processor, prompts, suffixes, images, regions, padding_side) -> dict[str, Any]:
    """Calls the processor; values for each token come as lists, with the offsets where the tokenizer has them."""
    tokenizer = processor.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = end_of_sequence(tokenizer)
    text_kwargs = {
        "padding": True,
        "padding_side": padding_side,
        "return_tensors": None,  # Pixtral's and Janus's processors make tensors unasked
        "return_special_tokens_mask": tokenizer.is_fast,
        "return_offsets_mapping": tokenizer.is_fast,
    }
    if tokenizer.bos_token and prompts[0].startswith(tokenizer.bos_token):
        text_kwargs["add_special_tokens"] = False
    more = {} if suffixes is None else {"suffix": suffixes}
    if regions is not None and any(region is not None for own in regions for region in own):
        more["regions"] = list(regions)
    return dict(
        processor(
            text=prompts,
            images=list(images) if any(images) else None,
            text_kwargs=text_kwargs,
            images_kwargs={"return_tensors": "pt"},
            return_text_replacement_offsets=True,
            **more,
        )
    )


def end_of_sequence(tokenizer) -> str:
    """Returns the end-of-sequence token, or raises a `ValueError` if the tokenizer has none."""
    if tokenizer.eos_token is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no end-of-sequence token, with which texts end and are padded. Name one "
            f"in its tokenizer_config.json (`eos_token`)."
        )
    return tokenizer.eos_token


def per_token(inputs: dict[str, torch.Tensor]) -> list[str]:
    """Returns the names of inputs with a value for each token, `(texts, tokens, ...)`."""
    names = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "cross_attention_mask")
    names += ("image_embeds_position_mask",)  # Kosmos-2's
    return [name for name in names if name in inputs]


def image_spans(processor, text: str) -> list[Span]:
    """Returns where the processor's mark for an image stands in a text."""
    return [match.span() for match in re.finditer(re.escape(processor.image_token), text)]


def _overlapping(span: Span, offsets: list[Span], written: list[int], replaced: list[dict]) -> list[int]:
    """
    Returns the positions of the tokens that overlap a span.

    Args:
        span (`tuple[int, int]`): In characters of the text as given.
        offsets (`list[tuple[int, int]]`): Of each token, in characters of the text with its images' marks replaced.
        written (`list[int]`): Positions of the tokens that stand for the text, one after the other.
        replaced (`list[dict]`): Where the marks stood, and where what replaced them stands.
    """
    marks = [item["span"][1] for item in replaced]
    gained = [0] + [item["new_span"][1] - item["span"][1] for item in replaced]
    first, last = (place + gained[bisect.bisect_right(marks, place)] for place in span)
    ends = [offsets[index][1] for index in written]
    # Some tokenizers trim the space off a token's offsets: a token reaches back to where the one before has ended.
    starts = [min(offsets[index][0], end) for index, end in zip(written, [0, *ends], strict=False)]
    return written[bisect.bisect_right(ends, first) : bisect.bisect_left(starts, last)]


def _split_suffixes(processor, texts, spans) -> tuple[list[str], list[str]]:
    """Splits texts into prompt and answer for PaliGemma's processor, which puts a line break between the two."""
    eos = processor.tokenizer.eos_token
    prompts, suffixes = [], []
    for text, own in zip(texts, spans, strict=True):
        behind = max([0, *(end for _, end in image_spans(processor, text))])
        starts = [start for start, end in own if end == len(text) and start >= behind]
        if len(starts) != 1 or any(behind < end < len(text) for _, end in own):
            raise ValueError(
                f"{type(processor).__name__} takes a prompt and one answer at its end, but of {text[-80:]!r} other "
                f"parts are asked for."
            )
        prompts.append(text[: starts[0]])
        suffixes.append(text[starts[0] :].removesuffix(eos))
    return prompts, suffixes


def _check_offsets(processor, texts, offsets, replaced, appends: bool) -> None:
    """Raises a `ValueError` if offsets of tokens are missing, or count characters of another text than ours."""
    for row, (text, marks) in enumerate(zip(texts, replaced, strict=True)):
        gained = marks[-1]["new_span"][1] - marks[-1]["span"][1] if marks else 0
        if offsets is None or not appends and max(end for _, end in offsets[row]) > len(text) + gained:
            raise ValueError(
                f"{type(processor).__name__} does not tell where its tokens lie in the text: it gives no offsets, or "
                f"adds to the text (a BOS token that the chat template does not write). Use a processor with a fast "
                f"tokenizer, and set `model.chat_template` to a template that writes all of the text."
            )


def _with_all_rows(inputs: dict[str, Any], texts: int) -> dict[str, Any]:
    """
    Adds to Llama 3.2's `aspect_ratio_ids` and `aspect_ratio_mask` the rows of the last texts, if these have no image:
    its image processor has such rows in its pixels and between other texts, but forgets them at the end (seen with
    transformers 5.24).
    """
    if "aspect_ratio_ids" in inputs:
        for name in ("aspect_ratio_ids", "aspect_ratio_mask"):
            rows = inputs[name]
            inputs[name] = torch.cat([rows, rows.new_zeros(texts - len(rows), *rows.shape[1:])])
        # As the image processor pads: attention over no tile at all would not be finite.
        inputs["aspect_ratio_mask"][..., 0] = 1
    return inputs
