"""lmms-eval's model `deem`: any vision-language model of transformers, with ours among them, in real batches."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import PartialState
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from deem_plugin.evaluation.chats import Chat, about_region, asks_for_a_region, cut, read_messages
from deem_plugin.evaluation.drawing import drawing_prompt, give_diffusion_model, keep_drawing, split_wish, with_drawing
from deem_plugin.evaluation.feature_cache import FeatureCache
from deem_plugin.evaluation.loading import load_vlm
from deem_plugin.evaluation.model_args import read_model_args
from deem_plugin.evaluation.yes_no import asks_yes_or_no, settle_answer, write_margin
from deem_plugin.models import DeemProcessor, generate_images

# For tasks that give no limit, as in lmms-eval's own models.
_MAX_NEW_TOKENS = 1024
# Batches that are sorted by length together. Questions about a picture stand near each other in a data set; sorted all
# at once they would be torn apart, and the picture's features forgotten between them.
_WINDOW = 8
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")


class _Deem(lmms):
    """
    What the chat and the simple class share.

    Args:
        model_args: As in [`~deem_plugin.evaluation.model_args.ModelArgs`].
    """

    def __init__(self, **model_args: Any):
        super().__init__()
        args = read_model_args(model_args)
        state = PartialState()
        self._rank, self._world_size = state.process_index, state.num_processes
        self.device = torch.device(args.device) if args.device is not None else state.device
        self.batch_size, self.raw_answers, self.answer_by = args.batch_size, args.raw_answers, args.answer_by
        self.image_dir, self.steps, self.guidance = args.image_dir, args.steps, args.guidance
        self.feature_cache = FeatureCache(args.feature_cache_mb * 2**20)
        self.model, self.processor = load_vlm(args.pretrained, args.dtype, self.device)
        self.tokenizer = self.processor.tokenizer
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if args.diffusion_model is not None:
            give_diffusion_model(self.model, args.diffusion_model, str(self.model.dtype).removeprefix("torch."))

    def _messages(self, request: Instance) -> list[dict]:
        """Returns lmms-eval's chat messages of a request, the images in them as PIL images."""
        raise NotImplementedError

    def _generation_kwargs(self, request: Instance) -> dict:
        raise NotImplementedError

    def _chat(self, request: Instance) -> Chat:
        """Returns what a request asks; of a region where the task is about one and the model reads regions."""
        *_, doc_id, task, split = request.args
        chat = read_messages(self._messages(request), task, doc_id)
        if asks_for_a_region(task) and isinstance(self.processor, DeemProcessor):
            return about_region(chat, self.task_dict[task][split][doc_id])
        return chat

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers the requests, in their order."""

        def answer(chats: list[Chat], kwargs: dict) -> list[str]:
            if self.answer_by == "drawing":
                pictures = self._draw(chats)
                return [keep_drawing(*pair, self.image_dir) for pair in zip(chats, pictures, strict=True)]
            answers = self._answer(chats, kwargs)
            if self.raw_answers:
                return answers
            return [settle_answer(chat.question, answer) for chat, answer in zip(chats, answers, strict=True)]

        return self._answer_all(requests, answer)

    def _answer_all(self, requests: list[Instance], answer: Callable[[list[Chat], dict], list[str]]) -> list[str]:
        """Answers requests in batches that all have images or that all have none, and returns them in order."""

        def kind(request: Instance) -> str:
            # A prompt about a region begins in another way than one of the chat template.
            return repr((self._generation_kwargs(request), asks_for_a_region(request.args[-2])))

        answers: list[str] = [""] * len(requests)
        with self._progress(len(requests), "Answering") as progress:
            for batch in self._batches(requests, kind):
                kwargs = self._generation_kwargs(requests[batch[0]])
                chats = [self._chat(requests[index]) for index in batch]
                # Processors take either images for every prompt or none at all.
                for with_images in (True, False):
                    part = [place for place, chat in enumerate(chats) if bool(chat.images) == with_images]
                    given = answer([chats[place] for place in part], kwargs) if part else []
                    for place, text in zip(part, given, strict=True):
                        answers[batch[place]] = text
                progress.update(len(batch))
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuses: lmms-eval offers log-likelihoods to simple models only."""
        raise NotImplementedError("Log-likelihood tasks need the simple class: run lmms-eval with `--force_simple`.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuses: a round that depends on earlier answers cannot be batched as these are."""
        raise NotImplementedError(
            "The model `deem` does not run tasks of several rounds (generate_until_multi_round)."
        )

    def _progress(self, total: int, description: str) -> tqdm:
        return tqdm(total=total, desc=description, disable=self.rank != 0)

    def _batches(self, requests: list[Instance], kind: Callable[[Instance], str]) -> Iterator[list[int]]:
        """Yields indices of requests of one kind, long prompts first: little padding, and memory runs out at once."""

        def length(index: int) -> int:
            return len(requests[index].args[0])

        kinds: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            kinds.setdefault(kind(request), []).append(index)
        for indices in kinds.values():
            windows = _chunks(indices, _WINDOW * self.batch_size)
            for window in sorted(windows, key=lambda window: max(map(length, window)), reverse=True):
                yield from _chunks(sorted(window, key=length, reverse=True), self.batch_size)

    def _encode(self, texts: list[str], images: list[list[Image.Image]], padding_side: str, regions: list = ()):
        """Tokenizes prompts and preprocesses their images; floats come in the model's dtype."""
        bos = self.tokenizer.bos_token
        about_regions = {}
        if any(region is not None for own in regions for region in own):
            images, regions = ([item for own in lists for item in own] for lists in (images, regions))
            about_regions = {"regions": regions}
        inputs = self.processor(
            text=texts,
            images=images if any(images) else None,
            **about_regions,
            padding=True,
            padding_side=padding_side,
            return_tensors="pt",
            # Chat templates write the bos token themselves; the tokenizer must not write a second.
            add_special_tokens=not (bos and texts[0].startswith(bos)),
        )
        return inputs.to(self.device, self.model.dtype)

    def _draw(self, chats: list[Chat]) -> list[Image.Image]:
        """Draws what chats that all have images or that all have none ask for; a picture's seed is its document."""
        prompts = [drawing_prompt(chat) for chat in chats]
        inputs = self._encode(prompts, [chat.images for chat in chats], padding_side="left")
        seeds = [chat.doc_id for chat in chats]
        return generate_images(self.model, inputs, seeds, steps=self.steps, guidance=self.guidance)

    def _answer(self, chats: list[Chat], kwargs: dict) -> list[str]:
        """Answers chats that all have images or that all have none, each in the way that `answer_by` says."""
        by_verdict = self.answer_by == "loglikelihood"
        decided = [by_verdict and asks_yes_or_no(chat.question) for chat in chats]
        verdicts = iter(self._decide([chat for chat, decide in zip(chats, decided, strict=True) if decide]))
        texts = iter(self._generate([chat for chat, decide in zip(chats, decided, strict=True) if not decide], kwargs))
        return [next(verdicts if decide else texts) for decide in decided]

    def _decide(self, chats: list[Chat]) -> list[str]:
        """Returns yes for chats after which "Yes" is likelier than "No", else no, each with its margin."""
        if not chats:
            return []
        prompt = chats[0].render(self.processor)
        # After "ASSISTANT:" some models go on with a space and some do not; after a line break, none does.
        leads = ("",) if prompt[-1].isspace() else ("", " ")
        yes, no = (
            torch.tensor([[-cost for cost, _ in self._score(chats, [lead + word] * len(chats))] for lead in leads])
            for word in ("Yes", "No")
        )  # (leads, chats)
        return [write_margin(margin) for margin in (yes.logsumexp(0) - no.logsumexp(0)).tolist()]

    @torch.inference_mode()
    def _generate(self, chats: list[Chat], kwargs: dict) -> list[str]:
        """Generates answers to chats that all have images or that all have none."""
        if not chats:
            return []
        kwargs = dict(kwargs)
        until = kwargs.pop("until", None) or []
        texts = [chat.render(self.processor) for chat in chats]
        inputs = self._encode(
            texts, [chat.images for chat in chats], padding_side="left", regions=[chat.regions for chat in chats]
        )
        shared = self.feature_cache.share(self.model, inputs)
        output = self.model.generate(**shared, generation_config=self._generation_config(kwargs))
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        answers = self.processor.batch_decode(new_tokens, skip_special_tokens=True)
        return [cut(answer, [until] if isinstance(until, str) else until) for answer in answers]

    @torch.inference_mode()
    def _score(self, chats: list[Chat], targets: list[str]) -> list[tuple[float, bool]]:
        """Scores targets after chats that all have images or that all have none."""
        if not chats:
            return []
        prompts = [chat.render(self.processor) for chat in chats]
        full = [prompt + target for prompt, target in zip(prompts, targets, strict=True)]
        # Padding goes to the right, where causal attention hides it whatever kind of positions the model has.
        inputs = self._encode(
            full, [chat.images for chat in chats], padding_side="right", regions=[chat.regions for chat in chats]
        )
        shared = self.feature_cache.share(self.model, inputs)
        log_probs = self.model(**shared).logits.float().log_softmax(-1)  # (batch, tokens, vocabulary)
        results = []
        for row, (prompt, text) in enumerate(zip(prompts, full, strict=True)):
            stop = int(inputs["attention_mask"][row].sum())
            start = stop - (len(self.tokenizer(text)["input_ids"]) - len(self.tokenizer(prompt)["input_ids"]))
            tokens = inputs["input_ids"][row, start:stop]
            predicted = log_probs[row, start - 1 : stop - 1]  # (target tokens, vocabulary)
            chosen = predicted.gather(-1, tokens[:, None])
            results.append((-chosen.sum().item(), bool((predicted.argmax(-1) == tokens).all())))
        return results

    def _generation_config(self, kwargs: dict):
        """Returns the model's generation config with a task's settings; those of other models' tasks are left out."""
        config = copy.deepcopy(self.model.generation_config)
        known = config.to_dict()
        settings = {"max_new_tokens": _MAX_NEW_TOKENS, **{key: kwargs[key] for key in kwargs if key in known}}
        settings.setdefault("do_sample", bool(settings.get("temperature")))
        if not settings["do_sample"]:
            settings.update(dict.fromkeys(_SAMPLING))
        config.update(**settings)
        config.max_length = None
        config.pad_token_id = self.tokenizer.pad_token_id
        if config.eos_token_id is None:
            config.eos_token_id = self.tokenizer.eos_token_id
        return config


class DeemChat(_Deem):
    """The class that lmms-eval takes by default: tasks hand over chat messages."""

    is_simple = False

    def _messages(self, request: Instance) -> list[dict]:
        _, doc_to_messages, _, doc_id, task, split = request.args
        return doc_to_messages(self.task_dict[task][split][doc_id])

    def _generation_kwargs(self, request: Instance) -> dict:
        return request.args[2]


class DeemSimple(_Deem):
    """The class for `--force_simple`: tasks hand over a text and its images; also scores log-likelihoods."""

    is_simple = True

    def _messages(self, request: Instance) -> list[dict]:
        context, _, doc_to_visual, doc_id, task, split = request.args
        images = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        parts = [{"type": "image", "url": image} for image in images]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": context}]}]

    def _generation_kwargs(self, request: Instance) -> dict:
        return request.args[1]

    def generate_visual_cot(self, requests: list[Instance]) -> list[str]:
        """Draws what each prompt wishes for, and answers its question with the drawing behind its own pictures."""
        if getattr(self.model, "diffusion_model", None) is None:
            raise ValueError(
                "A task has a picture drawn before it asks, which takes the interleaved model and what it draws with: "
                "`--model_args pretrained=...,diffusion_model=FOLDER_OR_HUB_ID`."
            )

        def answer(chats: list[Chat], kwargs: dict) -> list[str]:
            wishes, questions = zip(*map(split_wish, chats), strict=True)
            return self._answer(list(map(with_drawing, questions, self._draw(list(wishes)))), kwargs)

        return self._answer_all(requests, answer)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """
        Returns for each target the *negative* log-probability, summed over its tokens, and whether greedy decoding
        would give it. lmms-eval takes the choice with the smallest value.
        """
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with self._progress(len(requests), "Scoring") as progress:
            for batch in self._batches(requests, lambda request: ""):
                chats = [self._chat(requests[index]) for index in batch]
                targets = [self._target(requests[index]) for index in batch]
                for with_images in (True, False):
                    part = [place for place, chat in enumerate(chats) if bool(chat.images) == with_images]
                    results = self._score([chats[place] for place in part], [targets[place] for place in part])
                    for place, result in zip(part, results, strict=True):
                        scores[batch[place]] = result
                progress.update(len(batch))
        return scores

    def _target(self, request: Instance) -> str:
        _, target, _, doc_id, task, split = request.args
        return target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])


def _chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
