"""lmms-eval's model `deem`: any vision-language model of transformers, with ours among them, in real batches."""

from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from accelerate import PartialState
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from deem_plugin.evaluation.chats import Chat, read_messages
from deem_plugin.evaluation.drawing import give_diffusion_model, keep_drawing, split_wish, with_drawing
from deem_plugin.evaluation.loading import load_vlm
from deem_plugin.evaluation.model_args import read_model_args
from deem_plugin.evaluation.vlm import Vlm

# Questions that are handed over together even where batches are smaller, so that those about a picture share it.
_TOGETHER = 32


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
        self.vlm = Vlm(model, processor, self.args.batch_size)

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
        """Returns what `work` makes of each request, given to it with others of its kind and pictures."""

        def read(index: int) -> Chat:
            *_, doc_id, task, _ = requests[index].args
            return read_messages(self._messages(requests[index]), task, doc_id)

        def look(index: int) -> tuple:
            # Processors take images for every prompt or for none; a prompt about regions has no template.
            chat = read(index)
            return (kind(requests[index]), bool(chat.images), chat.about_regions), chat.pictures

        results: list = [None] * len(requests)
        with ThreadPoolExecutor() as pool:  # decoding takes most of it; what is decoded is not kept
            seen = list(pool.map(look, range(len(requests))))
        with tqdm(total=len(requests), desc=description, disable=self.rank != 0) as progress:
            for batch in _batches(requests, seen, max(self.args.batch_size, _TOGETHER)):
                given = work([read(index) for index in batch], [requests[index] for index in batch])
                for index, result in zip(batch, given, strict=True):
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


def _batches(requests: list[Instance], seen: list[tuple], size: int) -> Iterator[list[int]]:
    """
    Yields indices of requests of one kind, those about the same pictures together, and long prompts first: little
    padding, and memory runs out at once.

    Args:
        requests (`list[Instance]`): All requests.
        seen (`list[tuple]`): Of each its kind and its pictures.
        size (`int`): Most requests in a batch.
    """

    def length(group: list[int]) -> int:
        return max(len(requests[index].args[0]) for index in group)

    kinds: dict[Hashable, dict[Hashable, list[int]]] = {}
    for index, (kind, pictures) in enumerate(seen):
        kinds.setdefault(kind, {}).setdefault(pictures, []).append(index)
    for groups in kinds.values():
        batch: list[int] = []
        for group in sorted(groups.values(), key=length, reverse=True):
            for start in range(0, len(group), size):
                part = group[start : start + size]
                if len(batch) + len(part) > size:
                    yield batch
                    batch = []
                batch += part
        yield batch
