"""A vision-language model that answers chats in batches: by text, by likelihoods, by pictures."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from deem_plugin.data.chat import takes_suffix
from deem_plugin.data.tokens import tokenize
from deem_plugin.evaluation.chats import Chat, cut
from deem_plugin.evaluation.shared_prefix import SharedPrefix, forward
from deem_plugin.models import DeemProcessor, generate_images
from deem_plugin.models.processing import IMAGE_START_TOKEN

# For tasks that give no limit, as in lmms-eval's own models.
_MAX_NEW_TOKENS = 1024
# Positions whose logits are held at once: 2 GB of bfloat16 for a vocabulary of 256,000 words.
_MAX_LOGITS = 2**12
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")


@dataclass
class Vlm:
    """
    A model with its processor. All methods take chats that all have images or that all have none.

    Args:
        model (`PreTrainedModel` or `PeftModel`): In eval mode.
        processor (`ProcessorMixin`): Of the model.
        batch_size (`int`): Prompts that run at once; methods take any number.
    """

    model: Any
    processor: Any
    batch_size: int = 1

    def __post_init__(self):
        self.shared_prefix = SharedPrefix(self.model, self.processor)

    @torch.inference_mode()
    def generate(self, chats: list[Chat], settings: dict) -> list[str]:
        """
        Generates answers.

        Args:
            chats (`list[Chat]`): The prompts.
            settings (`dict`): lmms-eval's `generation_kwargs`, `until` among them.
        """
        settings = dict(settings)
        until = settings.pop("until", None) or []
        config = self._generation_config(settings)
        texts = [chat.render(self.processor) for chat in chats]

        def answer(rows: list[int], inputs: dict) -> list[str]:
            output = self.model.generate(**inputs, generation_config=config)
            new_tokens = output[:, inputs["input_ids"].shape[1] :]
            return self.processor.batch_decode(new_tokens, skip_special_tokens=True)

        answers = self.shared_prefix.run(
            lambda rows, side: self._encode(_at(rows, texts), _at(rows, chats), side)[0],
            # What is drawn depends on the rows that are drawn together.
            range(len(chats)) if config.do_sample else [chat.pictures for chat in chats],
            answer,
            self.batch_size,
            beams=config.num_beams or 1,
            # These read the prompt's tokens, and padding is one of them.
            pad=config.repetition_penalty in (None, 1.0) and not config.no_repeat_ngram_size,
        )
        return [cut(answer, [until] if isinstance(until, str) else until) for answer in answers]

    @torch.inference_mode()
    def log_likelihoods(self, chats: list[Chat], targets: list[str]) -> list[tuple[float, bool]]:
        """
        Returns for each target its log-probability after its chat, summed over its tokens, and whether greedy decoding
        gives it.
        """
        prompts = [chat.render(self.processor) for chat in chats]
        # lmms-eval writes a space before each target, which some prompts end in; PaliGemma's end in a line break.
        spaced = takes_suffix(self.processor)
        targets = [
            target.lstrip() if spaced or prompt[-1:].isspace() else target
            for prompt, target in zip(prompts, targets, strict=True)
        ]
        texts = list(map(str.__add__, prompts, targets))
        spans = [[(len(prompt), len(text))] for prompt, text in zip(prompts, texts, strict=True)]
        inputs, tokens = self._encode(texts, chats, "right", spans)
        answers = [ids[places].cpu() for ids, [places] in zip(inputs["input_ids"], tokens, strict=True)]
        # Answers of one token to one prompt are told by one row: what stands before their last token is all it takes.
        alike: dict[Any, list[int]] = {}
        for row, (chat, ids, [places]) in enumerate(zip(chats, inputs["input_ids"], tokens, strict=True)):
            if places:
                alike.setdefault((chat.pictures, *ids[: places[-1]].tolist()), []).append(row)
        unique = list(alike.values())
        most = max(1, *map(len, answers))

        def encode(places: Sequence[int], side: str):
            rows = [unique[place][0] for place in places]
            return self._encode(_at(rows, texts), _at(rows, chats), side, _at(rows, spans))[0]

        def score(places: list[int], inputs: dict) -> list[list[tuple[float, bool]]]:
            logits = forward(self.model, inputs, most).logits
            return [
                [_score(own[-len(answers[row]) :], answers[row]) for row in unique[place]]
                for place, own in zip(places, logits, strict=True)
            ]

        pictures = [chats[rows[0]].pictures for rows in unique]
        at_once = max(1, min(self.batch_size, _MAX_LOGITS // most))
        needs = [max(len(answers[row]) for row in rows) for rows in unique]
        scores = self.shared_prefix.run(encode, pictures, score, at_once, leave=1, needs=needs)
        by_row = dict(zip(sum(unique, []), sum(scores, []), strict=True))
        return [by_row.get(row, (0.0, True)) for row in range(len(chats))]  # to say nothing is certain

    @torch.inference_mode()
    def draw(self, chats: list[Chat], steps: int, guidance: float) -> list[Image.Image]:
        """Draws what the chats ask for; a picture's seed is the number of its document."""
        pictures = []
        for start in range(0, len(chats), self.batch_size):
            own = chats[start : start + self.batch_size]
            texts = [chat.as_document(self.processor) + IMAGE_START_TOKEN for chat in own]
            inputs, _ = self._encode(texts, own, "left")
            seeds = [chat.doc_id for chat in own]
            pictures += generate_images(self.model, inputs, seeds, steps=steps, guidance=guidance)
        return pictures

    def _encode(self, texts: list[str], chats: list[Chat], padding_side: str, spans=None):
        """Returns the model's inputs on its device, floats in its dtype, and what `tokenize` says of the spans."""
        if any(chat.about_regions for chat in chats) and not isinstance(self.processor, DeemProcessor):
            raise ValueError(
                f"The task {chats[0].task} asks about regions, which {type(self.processor).__name__} does not read. "
                f"Run lmms-eval's own task, which draws them on the picture (`refcoco_seg_*` for `deem_refcoco_*`)."
            )
        images, regions = [chat.images for chat in chats], [chat.regions for chat in chats]
        inputs, tokens = tokenize(self.processor, texts, images, spans, regions=regions, padding_side=padding_side)
        return inputs.to(self.model.device, self.model.dtype), tokens

    def _generation_config(self, settings: dict):
        """Returns the model's generation config with a task's settings; those of other models' tasks are left out."""
        config = copy.deepcopy(self.model.generation_config)
        known = config.to_dict()
        settings = {"max_new_tokens": _MAX_NEW_TOKENS, **{key: settings[key] for key in settings if key in known}}
        sampled = bool(settings.get("temperature"))
        settings["do_sample"] = settings.get("do_sample", sampled) and settings.get("temperature") != 0
        if not settings["do_sample"]:
            settings.update(dict.fromkeys(_SAMPLING))
        config.update(**settings)
        config.max_length = None
        config.pad_token_id = self.processor.tokenizer.pad_token_id
        if config.eos_token_id is None:
            config.eos_token_id = self.processor.tokenizer.eos_token_id
        return config


def _score(logits: torch.Tensor, chosen: torch.Tensor) -> tuple[float, bool]:
    """Returns the log-probability of tokens `(tokens,)` by logits `(tokens, vocabulary)`, and if they are greedy."""
    log_probs, chosen = logits.float().log_softmax(-1), chosen.to(logits.device)
    total = log_probs.gather(-1, chosen[:, None]).sum().item()
    if math.isnan(total):
        raise ValueError("The model's logits are not finite. In half precision, give `dtype=bfloat16` or `float32`.")
    return total, bool((log_probs.argmax(-1) == chosen).all())


def _at(rows: Sequence[int], items: Sequence) -> list:
    return [items[row] for row in rows]
