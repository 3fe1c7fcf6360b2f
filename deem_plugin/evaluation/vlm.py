"""A vision-language model that answers chats in batches: by text, by likelihoods, by pictures."""

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from deem_plugin.data.chat import takes_suffix
from deem_plugin.data.tokens import tokenize
from deem_plugin.evaluation.chats import Chat, cut
from deem_plugin.evaluation.feature_cache import FeatureCache
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
        feature_cache (`FeatureCache`): For the pictures that chats share.
    """

    model: Any
    processor: Any
    feature_cache: FeatureCache

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
        inputs, _ = self._encode([chat.render(self.processor) for chat in chats], chats, "left")
        shared = self.feature_cache.share(self.model, inputs)
        output = self.model.generate(**shared, generation_config=self._generation_config(settings))
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        answers = self.processor.batch_decode(new_tokens, skip_special_tokens=True)
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
        scored = [(ids, places) for ids, [places] in zip(inputs["input_ids"], tokens, strict=True)]
        sources = _sources([(chat.task, chat.doc_id) for chat in chats], scored)
        rows = sorted(set(sources))
        positions = {place for _, places in scored for place in places}
        if len(rows) > 1 and len(rows) * len(positions) > _MAX_LOGITS:
            half = len(chats) // 2
            halves = (slice(half), slice(half, None))
            return [score for part in halves for score in self.log_likelihoods(chats[part], targets[part])]
        if len(rows) < len(chats):
            texts, chats, spans = ([items[row] for row in rows] for items in (texts, chats, spans))
            inputs, _ = self._encode(texts, chats, "right", spans)
        return self._score(inputs, [(rows.index(source), *own) for source, own in zip(sources, scored, strict=True)])

    def _score(self, inputs, scored: list[tuple[int, torch.Tensor, list[int]]]) -> list[tuple[float, bool]]:
        """
        Scores tokens in one forward.

        Args:
            inputs (`BatchFeature`): Of the model, padded on the right: causal attention hides that for all positions.
            scored (`list`): Row of the inputs, token ids `(tokens,)` and the positions among them to score.
        """
        positions = sorted({place - 1 for _, _, places in scored for place in places})
        # Of a long text with a large vocabulary all logits would take gigabytes.
        forward = getattr(self.model, "get_base_model", lambda: self.model)().forward
        some = "logits_to_keep" in inspect.signature(forward).parameters
        kept = {"logits_to_keep": torch.tensor(positions, device=self.model.device)} if some else {}
        logits = self.model(**self.feature_cache.share(self.model, inputs), **kept).logits  # (rows, kept, vocabulary)
        results = []
        for row, ids, places in scored:
            at = [positions.index(place - 1) if some else place - 1 for place in places]
            log_probs, chosen = logits[row, at].float().log_softmax(-1), ids[places].to(logits.device)
            total = log_probs.gather(-1, chosen[:, None]).sum().item()
            results.append((total, bool((log_probs.argmax(-1) == chosen).all())))
        return results

    @torch.inference_mode()
    def draw(self, chats: list[Chat], steps: int, guidance: float) -> list[Image.Image]:
        """Draws what the chats ask for; a picture's seed is the number of its document."""
        texts = [chat.as_document(self.processor) + IMAGE_START_TOKEN for chat in chats]
        inputs, _ = self._encode(texts, chats, "left")
        return generate_images(self.model, inputs, [chat.doc_id for chat in chats], steps=steps, guidance=guidance)

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
        settings.setdefault("do_sample", bool(settings.get("temperature")))
        if not settings["do_sample"]:
            settings.update(dict.fromkeys(_SAMPLING))
        config.update(**settings)
        config.max_length = None
        config.pad_token_id = self.processor.tokenizer.pad_token_id
        if config.eos_token_id is None:
            config.eos_token_id = self.processor.tokenizer.eos_token_id
        return config


def _sources(documents: list, scored: list[tuple[torch.Tensor, list[int]]]) -> list[int]:
    """
    Returns for each row the row whose forward gives its scores: one of the same document that begins with all that
    stands before its last scored token. So answers of one token each after one prompt are one row.
    """
    sources: list[int] = []
    for row, (document, (ids, places)) in enumerate(zip(documents, scored, strict=True)):
        before = ids[: places[-1]]
        alike = (
            other
            for other in sources
            if documents[other] == document and torch.equal(scored[other][0][: places[-1]], before)
        )
        sources.append(next(alike, row))
    return sources
