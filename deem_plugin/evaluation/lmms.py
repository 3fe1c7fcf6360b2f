"""lmms-eval's model `deem`: any vision-language model of transformers, with ours among them, in real batches."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import PartialState
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from deem_plugin.evaluation.chats import Chat, read_messages
from deem_plugin.evaluation.drawing import give_diffusion_model, keep_drawing, split_wish, with_drawing
from deem_plugin.evaluation.feature_cache import FeatureCache
from deem_plugin.evaluation.loading import load_vlm
from deem_plugin.evaluation.model_args import read_model_args
from deem_plugin.evaluation.vlm import Vlm

# Batches that are sorted by length together. Questions about a picture stand near each other in a data set; sorted all
# at once they would be torn apart, and the picture's features forgotten between them.
_WINDOW = 8


class _Deem(lmms):
    """
    What the chat and the simple class share: requests become chats, which a [`Vlm`] answers as it would for anyone.

    Args:
        model_args: As in [`~deem_plugin.evaluation.model_args.ModelArgs`].
    """

    def __init__(self, **model_args: Any):
        super().__init__()
        self.args = read_model_args(model_args)
        state = PartialState()
        self._rank, self._world_size = state.process_index, state.num_processes
        self.device = torch.device(self.args.device) if self.args.device is not None else state.device
        model, processor = load_vlm(self.args.pretrained, self.args.dtype, self.device)
        if self.args.diffusion_model is not None:
            give_diffusion_model(model, self.args.diffusion_model, str(model.dtype).removeprefix("torch."))
        self.vlm = Vlm(model, processor, FeatureCache(self.args.feature_cache_mb * 2**20))

    def _messages(self, request: Instance) -> list[dict]:
        """Returns lmms-eval's chat messages of a request, the images in them as PIL images."""
        raise NotImplementedError

    def _generation_kwargs(self, request: Instance) -> dict:
        raise NotImplementedError

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers the requests, in their order, by what the model generates up to a stop string, or by pictures."""

        def answer(chats: list[Chat], requests: list[Instance]) -> list[str]:
            if self.args.image_dir is None:
                return self.vlm.generate(chats, self._generation_kwargs(requests[0]))
            pictures = self.vlm.draw(chats, self.args.steps, self.args.guidance)
            return [keep_drawing(*pair, self.args.image_dir) for pair in zip(chats, pictures, strict=True)]

        return self._map(requests, answer, "Answering", lambda request: repr(self._generation_kwargs(request)))

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuses: lmms-eval offers log-likelihoods to simple models only."""
        raise NotImplementedError("Log-likelihood tasks need the simple class: run lmms-eval with `--force_simple`.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuses: a round that depends on earlier answers cannot be batched as these are."""
        raise NotImplementedError(
            "The model `deem` does not run tasks of several rounds (generate_until_multi_round)."
        )

    def clean(self):
        """Frees the model, which lmms-eval does before it scores."""
        self.vlm = None
        super().clean()

    def _map(
        self,
        requests: list[Instance],
        work: Callable[[list[Chat], list[Instance]], list],
        description: str,
        kind: Callable[[Instance], str] = lambda request: "",
    ) -> list:
        """Returns what `work` makes of each request, given to it in batches of one kind that go together."""
        results: list = [None] * len(requests)
        with tqdm(total=len(requests), desc=description, disable=self.rank != 0) as progress:
            for batch in _batches(requests, self.args.batch_size, kind):
                chats = {}
                for index in batch:
                    *_, doc_id, task, _ = requests[index].args
                    chats[index] = read_messages(self._messages(requests[index]), task, doc_id)
                # Processors take images for every prompt or for none; a prompt about regions has no template.
                forms = {index: (bool(chat.images), chat.about_regions) for index, chat in chats.items()}
                for form in sorted(set(forms.values())):
                    part = [index for index in batch if forms[index] == form]
                    given = work([chats[index] for index in part], [requests[index] for index in part])
                    for index, result in zip(part, given, strict=True):
                        results[index] = result
                progress.update(len(batch))
        return results


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
        if self.args.diffusion_model is None:
            raise ValueError(
                "A task has a picture drawn before it asks, which takes the interleaved model and what it draws with: "
                "`--model_args pretrained=...,diffusion_model=FOLDER_OR_HUB_ID`."
            )

        def answer(chats: list[Chat], requests: list[Instance]) -> list[str]:
            wishes, questions = zip(*map(split_wish, chats), strict=True)
            pictures = self.vlm.draw(list(wishes), self.args.steps, self.args.guidance)
            return self.vlm.generate(
                list(map(with_drawing, questions, pictures)), self._generation_kwargs(requests[0])
            )

        return self._map(requests, answer, "Drawing and answering", lambda request: repr(request.args[1]))

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """
        Returns for each target the *negative* log-probability, summed over its tokens, and whether greedy decoding
        would give it. lmms-eval takes the choice with the smallest value.
        """

        def score(chats: list[Chat], requests: list[Instance]) -> list[tuple[float, bool]]:
            scores = self.vlm.log_likelihoods(chats, list(map(self._target, requests)))
            return [(-total, is_greedy) for total, is_greedy in scores]

        return self._map(requests, score, "Scoring")

    def _target(self, request: Instance) -> str:
        _, target, _, doc_id, task, split = request.args
        return target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])


def _batches(requests: list[Instance], size: int, kind: Callable[[Instance], str]) -> Iterator[list[int]]:
    """Yields indices of requests of one kind, long prompts first: little padding, and memory runs out at once."""

    def length(index: int) -> int:
        return len(requests[index].args[0])

    kinds: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        kinds.setdefault(kind(request), []).append(index)
    for indices in kinds.values():
        windows = _chunks(indices, _WINDOW * size)
        for window in sorted(windows, key=lambda window: max(map(length, window)), reverse=True):
            yield from _chunks(sorted(window, key=length, reverse=True), size)


def _chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
