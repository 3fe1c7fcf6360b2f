"""What prompts about the same pictures begin with goes through the language model once."""

import copy
import inspect
import logging
import os.path
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Cache
from transformers.cache_utils import DummyLayer, DynamicLayer

from deem_plugin.data.chat import takes_suffix
from deem_plugin.data.tokens import per_token
from deem_plugin.vision.towers import without_peft

logger = logging.getLogger(__name__)

# Relative differences of logits that are rounding, 0.05 in half precision. What would be wrong (a picture that attends
# to the question, other positions, a state beside the cache) is far above them in a trained model.
_ROUNDING = {torch.float32: 1e-3}

# Makes the model's inputs of the prompts of some rows, padded on the given side.
Encode = Callable[[Sequence[int], str], Mapping[str, Any]]


@dataclass
class SharedPrefix:
    """
    Runs a model on prompts, and on the common beginning of those with the same pictures once.

    The beginning is prefilled, its cache copied for as many prompts as run at once, and each goes on behind it.
    Nothing is shared where that would not be exact: by encoder-decoders and PaliGemma, whose pictures attend to the
    question, and by models whose first prompt comes out otherwise than in full. The log says so once.

    Args:
        model (`PreTrainedModel` or `PeftModel`): In eval mode.
        processor (`ProcessorMixin`): Of the model.
    """

    model: Any
    processor: Any
    # None until the first prompt has been compared; then also whether there may be padding in the middle.
    shares: bool | None = field(default=None, init=False)
    pads: bool = field(default=False, init=False)

    def __post_init__(self):
        # Gemma 3's checkpoints ask for a cache of fixed length, behind which nothing else could go on.
        without_peft(self.model).generation_config.cache_implementation = None
        if self.model.config.is_encoder_decoder or takes_suffix(self.processor):
            self._refuse("its pictures attend to the question")

    def run(
        self,
        encode: Encode,
        pictures: Sequence[Hashable],
        work: Callable[[list[int], dict[str, Any]], Sequence],
        at_once: int,
        *,
        leave: int = 0,
        needs: Sequence[int] | None = None,
        beams: int = 1,
        pad: bool = True,
    ) -> list:
        """
        Returns what `work` makes of each prompt, in their order.

        Args:
            encode (`Callable`): See `Encode`; each row of tokens begins with its text.
            pictures (`Sequence`): For each prompt what is equal for those with the same pictures.
            work (`Callable`): Takes rows and their arguments of `model.generate`, and returns a value for each row.
            at_once (`int`): Rows that run at once.
            leave (`int`): Tokens at the end of each prompt that the model does not see.
            needs (`Sequence[int]`, *optional*): Tokens before those whose logits `work` reads; by default one.
            beams (`int`): Copies of each row that `generate` makes.
            pad (`bool`): Whether there may be padding between what is shared and the rest of a prompt.
        """
        results: dict[int, Any] = {}
        groups = [] if self.shares is False else _of_several(pictures)
        if groups:
            prompts = _Prompts(encode, groups, leave, needs or [1] * len(pictures), self.processor)
            if prompts.groups and self.shares is None:
                self._compare(encode, prompts, leave)
            pad = pad and self.pads
            for batch in _chunks(prompts.groups if self.shares else [], at_once if pad else 1):
                prefix = _Prefix(self.model, encode, prompts, batch)
                for rows in prompts.together(sum(batch, []), at_once, pad):
                    results.update(zip(rows, work(rows, prefix.behind(rows, beams)), strict=True))
        alone = [row for row in range(len(pictures)) if row not in results]
        for rows in _chunks(alone, at_once):
            results.update(zip(rows, work(rows, _without_last(encode(rows, "left"), leave)), strict=True))
        return [results[row] for row in range(len(pictures))]

    def _compare(self, encode: Encode, prompts: "_Prompts", leave: int):
        """Decides by the next two tokens' logits of a prompt whether the model goes on from a cache as without."""
        row = prompts.groups[0][:1]
        settings = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "num_beams": 1}

        def logits(inputs: dict) -> torch.Tensor:
            output = self.model.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)
            return torch.cat(output.logits).float()

        def difference(padding: int) -> float:
            given = logits(prefix.behind(row, padding=padding))
            # In half precision a near tie may fall otherwise, and the second token is behind another one then.
            steps = 1 + int(given[0].argmax() == expected[0].argmax())
            return ((given - expected)[:steps].norm() / size).item()

        expected = logits(_without_last(encode(row, "left"), leave))
        size = (expected - expected.mean(-1, keepdim=True)).norm()
        rounding = _ROUNDING.get(self.model.dtype, 0.05)
        try:
            prefix = _Prefix(self.model, encode, prompts, prompts.groups[:1])
            self.shares = (without := difference(0)) <= rounding
            # Windows and recurrent states count padding as tokens; some models count their positions themselves.
            layers = (type(layer) in (DynamicLayer, DummyLayer) for layer in prefix.cache.layers)
            self.pads = self.shares and all(layers) and difference(1) <= rounding
        except Exception as error:  # whatever a model raises that cannot be called so: the run goes on without
            return self._refuse(f"it does not continue from a cache ({type(error).__name__}: {error})")
        if not self.shares:
            self._refuse(f"continued from a cache its logits differ by {without:.1%}")

    def _refuse(self, reason: str):
        self.shares = False
        logger.warning(
            "%s computes each prompt in full: what prompts about a picture have in common is not shared, since %s.",
            type(self.model).__name__,
            reason,
        )


class _Prompts:
    """
    Tokens of prompts that share a beginning.

    Args:
        encode (`Callable`): See `Encode`.
        groups (`list[list[int]]`): Rows of prompts with the same pictures.
        leave, needs (`int` and `Sequence[int]`): See `SharedPrefix.run`.
        processor (`ProcessorMixin`): Of the model.

    Attributes:
        groups (`list[list[int]]`): Those that begin alike, with all of their pictures.
        starts, ends (`dict[int, int]`): By row, where what is not shared begins, and the end.
    """

    def __init__(self, encode: Encode, groups: list[list[int]], leave: int, needs: Sequence[int], processor):
        rows = sum(groups, [])
        inputs = encode(rows, "right")
        self.pad_token_id = processor.tokenizer.pad_token_id
        self.tensors = {name: inputs[name] for name in per_token(inputs)}
        self.places = {row: place for place, row in enumerate(rows)}
        ends = (inputs["attention_mask"].long().sum(1) - leave).tolist()
        self.ends = dict(zip(rows, ends, strict=True))
        tokens = {row: inputs["input_ids"][self.places[row], : self.ends[row]].tolist() for row in rows}
        image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
        self.groups, self.starts = [], {}
        for own in groups:
            most = min(self.ends[row] - needs[row] for row in own)
            shared = os.path.commonprefix([tokens[row] for row in own])[: max(0, most)]
            # Behind a picture positions may jump, as those of Qwen-VL; from a token of text on they count by ones.
            if shared and shared[-1] != image and all(image not in tokens[row][len(shared) :] for row in own):
                self.groups.append(own)
                self.starts |= dict.fromkeys(own, len(shared))

    def together(self, rows: list[int], most: int, pad: bool) -> list[list[int]]:
        """Returns rows to run at once, those of like length together, and only those of one length without padding."""

        def length(row: int) -> int:
            return self.ends[row] - self.starts[row]

        lengths = [rows] if pad else [[row for row in rows if length(row) == own] for own in set(map(length, rows))]
        return [part for own in lengths for part in _chunks(sorted(own, key=length, reverse=True), most)]

    def take(self, rows: list[int], columns: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the inputs for each token of some rows, at columns `(rows, tokens)`; those below 0 are padding."""
        columns = columns.to(self.tensors["input_ids"].device)
        at = torch.tensor([self.places[row] for row in rows], device=columns.device)[:, None], columns.clamp(min=0)
        taken = {}
        for name, tensor in self.tensors.items():
            padding = (columns < 0).view(*columns.shape, *[1] * (tensor.ndim - 2))
            taken[name] = tensor[at].masked_fill(padding, self.pad_token_id if name == "input_ids" else 0)
        return taken


class _Prefix:
    """
    The cache of what groups of prompts begin with.

    Args:
        model (`PreTrainedModel` or `PeftModel`): In eval mode.
        encode (`Callable`): See `Encode`; it makes the pictures of each group's first prompt.
        prompts (`_Prompts`): All prompts.
        groups (`list[list[int]]`): Of the prompts' groups.
    """

    def __init__(self, model, encode: Encode, prompts: _Prompts, groups: list[list[int]]):
        self.prompts = prompts
        self.row = {row: place for place, own in enumerate(groups) for row in own}  # of the cache
        firsts = [own[0] for own in groups]
        self.columns = _aligned([0] * len(firsts), [prompts.starts[row] for row in firsts])
        output = forward(model, {**encode(firsts, "left"), **prompts.take(firsts, self.columns)})
        self.cache: Cache = output.cache
        self.positions = output.positions
        self.image_maps = getattr(output, "image_maps", None)  # what the interleaved model keeps beside its cache

    def behind(self, rows: list[int], beams: int = 1, padding: int = 0) -> dict[str, Any]:
        """Returns what `model.generate` takes to go on behind the prefix, and `padding`, with some rows' prompts."""
        prompts, own = self.prompts, torch.tensor([self.row[row] for row in rows])
        rest = _aligned([prompts.starts[row] for row in rows], [prompts.ends[row] for row in rows])
        rest = F.pad(rest, (padding, 0), value=-1)
        inputs: dict[str, Any] = prompts.take(rows, torch.cat([self.columns[own], rest], dim=1))
        own = own.to(inputs["input_ids"].device)
        copies = own.repeat_interleave(beams)
        inputs["cache"] = copy.deepcopy(self.cache)
        inputs["cache"].reorder_cache(copies)
        if self.image_maps is not None:
            levels, visible = self.image_maps
            inputs["image_maps"] = ([level[copies] for level in levels], visible[copies])
        if self.positions is not None:  # (..., rows, tokens)
            steps = (rest >= 0).cumsum(1).to(own.device)
            inputs["position_ids"] = self.positions[..., -1:].index_select(-2, own) + steps
        return inputs


def forward(model, inputs: Mapping[str, Any], logits: int = 1):
    """
    Runs a model once, on what its `generate` makes of the inputs: masks, positions and cache.

    Args:
        model (`PreTrainedModel` or `PeftModel`): In eval mode.
        inputs (`Mapping`): For `generate`; rows are padded on the left.
        logits (`int`): Last tokens of which the logits are needed.

    Returns:
        `ModelOutput`: Of the model, with `logits` of the last tokens `(rows, at least logits, vocabulary)`, and
        `positions`, what the model took for `position_ids`, or None.
    """

    # Parameters that are named here, `generate` would not prepare.
    def run(model, input_ids, logits_processor, stopping_criteria, generation_config, **prepared):
        cache = prepared.get("cache")
        before = 0 if cache is None else cache.get_seq_length()
        arguments = model.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=input_ids.shape[1] - before if before else None,
            is_first_iteration=True,
            **prepared,
        )
        output = model(**arguments, return_dict=True)
        output.positions = prepared.get("position_ids")
        return output

    if "logits_to_keep" in inspect.signature(without_peft(model).forward).parameters:
        inputs = {**inputs, "logits_to_keep": logits}
    return model.generate(**inputs, custom_generate=run, max_new_tokens=1, do_sample=False, num_beams=1)


def _aligned(starts: list[int], ends: list[int]) -> torch.Tensor:
    """Returns the numbers from each start up to its end, padded on the left by -1, `(rows, longest)`."""
    first, last = torch.tensor(starts)[:, None], torch.tensor(ends)[:, None]
    width = int((last - first).max())
    numbers = last - width + torch.arange(width)
    return numbers.masked_fill(numbers < first, -1)


def _of_several(pictures: Sequence[Hashable]) -> list[list[int]]:
    """Returns the rows of equal pictures, where there are several."""
    rows: dict[Hashable, list[int]] = {}
    for row, own in enumerate(pictures):
        rows.setdefault(own, []).append(row)
    return [own for own in rows.values() if len(own) > 1]


def _without_last(inputs: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """Returns inputs padded on the left without the last tokens of each row."""
    cut = {name: inputs[name][:, : inputs[name].shape[1] - tokens] for name in per_token(inputs)}
    return {**inputs, **cut}


def _chunks(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]
