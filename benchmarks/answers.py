"""
How many questions a second the lmms-eval model answers, plain and with each way to make it faster:
`python -m benchmarks.answers`.

Plain is a question at a time, each in full. Each option answers the same questions in turn with plain, pair by pair,
so that whatever else runs on the machine slows both. The model that is made has LLaVA-1.5's proportions: nearly all of
the work is the language model's, most of it on the tokens of pictures.
"""

import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from tqdm.auto import tqdm

from benchmarks.answers_model import CONFIGS, draw_picture, save_model
from benchmarks.common import check_names, clock_of, make_parser, show
from deem_plugin.evaluation.loading import load_vlm
from deem_plugin.vision.towers import find_tower

# Arguments of the lmms-eval model, and whether prompts about a picture share their beginning; 16 is `deem eval`'s own.
PLAIN = {"batch_size": 1, "shares": False}
OPTIONS = {
    "shared prefix": {"batch_size": 1},
    "batches of 16": {"batch_size": 16, "shares": False},
    "batches of 16, shared prefix": {"batch_size": 16},
    "batches of 16, shared prefix, bfloat16": {"batch_size": 16, "dtype": "bfloat16"},
}
# By name, how many questions about one picture there are, and what they begin with and end in; words between the two
# make them differ in length. The last are as long as others are in a tokenizer of words.
QUESTION_SETS = {
    "RobustVQA": (2, "Is {}dog the main object in this image?"),
    "POPE": (6, "Is there a {}dog in the image?"),
    "short": (6, "Is {}it?"),
}
_WORDS = ("", "a ", "a big ", "no ", "one ", "not a ")
GENERATION = {"max_new_tokens": 4, "do_sample": False, "temperature": 0}


@dataclass
class EvalTiming:
    """
    What one option gains on one set of questions.

    Args:
        questions (`str`): The set, one of `QUESTION_SETS`.
        name (`str`): The option, or `plain`.
        ratio (`float`): Median over pairs of plain's time by this one's.
        questions_per_second (`float`): Median.
        other_answers (`float`): Share of the answers that differ from plain's.
        peak_bytes (`int`, *optional*): Most memory of weights and answering on a GPU; None elsewhere.
    """

    questions: str
    name: str
    ratio: float
    questions_per_second: float
    other_answers: float
    peak_bytes: int | None = None


@dataclass
class EvalBench:
    """
    A whole benchmark.

    Args:
        model (`str`): Checkpoint, or name of the sizes.
        proportion (`float`): Parameters of all but the tower, by those of the tower.
        device (`str`): Where it ran.
        threads (`int`): CPU threads.
        clock (`str`): What was counted.
        pairs (`int`): Pairs of runs for each option.
        timings (`list[EvalTiming]`): Plain and the options, for each set of questions.
    """

    model: str
    proportion: float
    device: str
    threads: int
    clock: str
    pairs: int
    timings: list[EvalTiming] = field(default_factory=list)


class _Runner:
    """A loaded model that answers a set of questions again and again."""

    def __init__(self, checkpoint: str, device: torch.device, arguments: dict, docs: list[dict]):
        arguments = dict(arguments)
        shares = arguments.pop("shares", True)
        from deem_plugin.evaluation.lmms import DeemChat

        self.on_gpu = device.type == "cuda"
        self.before = torch.cuda.memory_allocated(device) if self.on_gpu else 0
        self.device, self.clock = device, clock_of(device)[0]
        self.model = DeemChat(pretrained=checkpoint, device=str(device), **arguments)
        if not shares:
            self.model.vlm.shared_prefix.shares = False
        self.model.task_dict = {"task": {"test": docs}}
        # The model reads nothing of lmms-eval's requests but their arguments.
        self.requests = [
            SimpleNamespace(args=(doc["question"], _to_messages, GENERATION, index, "task", "test"))
            for index, doc in enumerate(docs)
        ]

    def __call__(self) -> tuple[float, list[str]]:
        """Returns seconds and answers."""
        started = self.clock()
        answers = self.model.generate_until(self.requests)
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        return self.clock() - started, answers

    def peak(self) -> int | None:
        """Returns the most memory of weights and one run on a GPU."""
        if not self.on_gpu:
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        self()
        return torch.cuda.max_memory_allocated(self.device) - self.before


def _to_messages(doc: dict) -> list[dict]:
    parts = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": parts}]


def questions_about(pictures: int, name: str, size: int) -> list[dict]:
    """Makes the questions of a set, of different lengths, about pictures of `size` pixels."""
    each, text = QUESTION_SETS[name]
    return [
        {"image": draw_picture(index, size), "question": text.format(_WORDS[number])}
        for index in range(pictures)
        for number in range(each)
    ]


def run_eval_bench(
    checkpoint: str | None = None,
    config: str = "llava",
    pairs: int = 3,
    device: str | None = None,
    options: Sequence[str] = tuple(OPTIONS),
    questions: int = 24,
) -> EvalBench:
    """
    Times options against plain answering, alternately.

    Args:
        checkpoint (`str`, *optional*): Folder or hub id of a VLM; by default one of `config` is made.
        config (`str`): One of `CONFIGS`: sizes of the model that is made, and of the pictures.
        pairs (`int`): Pairs of runs for each option.
        device (`str`, *optional*): By default a GPU where there is one.
        options (`Sequence[str]`): Of `OPTIONS`; all by default.
        questions (`int`): Questions of each set, a multiple of 6.

    Raises:
        ValueError: If there is no such config or option.
    """
    check_names("config", [config], CONFIGS)
    check_names("option", options, OPTIONS)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with nullcontext(checkpoint) if checkpoint else tempfile.TemporaryDirectory() as folder:
        if checkpoint is None:
            save_model(config, folder)
        threads, clock = torch.get_num_threads(), clock_of(place)[1]
        bench = EvalBench(checkpoint or config, _proportion(folder), str(place), threads, clock, pairs)
        for name, (each, _) in QUESTION_SETS.items():
            docs = questions_about(questions // each, name, CONFIGS[config]["image_size"])
            bench.timings += _time_set(name, docs, folder, place, pairs, options)
    return bench


def _proportion(checkpoint: str) -> float:
    """Returns how many times the parameters of its tower the rest of a model has."""
    model, _ = load_vlm(checkpoint)
    tower = sum(parameter.numel() for parameter in find_tower(model).parameters())
    return sum(parameter.numel() for parameter in model.parameters()) / tower - 1


def _time_set(questions, docs, checkpoint, device, pairs, options) -> list[EvalTiming]:
    """Returns plain's timing and the options' on one set of questions."""
    plain = _Runner(checkpoint, device, PLAIN, docs)
    _, expected = plain()  # also warms up
    plain_seconds, timings = [], []
    for option in tqdm(options, desc=questions):
        runner = _Runner(checkpoint, device, OPTIONS[option], docs)
        _, answers = runner()
        runs = [(plain()[0], runner()[0]) for _ in range(pairs)]
        plain_seconds += [slow for slow, _ in runs]
        timings.append(
            EvalTiming(
                questions,
                option,
                ratio=median(slow / fast for slow, fast in runs),
                questions_per_second=len(docs) / median(fast for _, fast in runs),
                other_answers=sum(a != b for a, b in zip(answers, expected, strict=True)) / len(docs),
                peak_bytes=runner.peak(),
            )
        )
    speed = len(docs) / median(plain_seconds)
    return [EvalTiming(questions, "plain", 1.0, speed, 0.0, plain.peak()), *timings]


def table(bench: EvalBench) -> str:
    """Returns the benchmark as a Markdown table."""
    where = f"{bench.device}, {bench.threads} threads, {bench.clock}"
    lines = [
        f"model {bench.model}, all but its tower {bench.proportion:.2g} times the tower's parameters, {where}, "
        f"medians of {bench.pairs} pairs",
        "",
        "| questions | answering | times as fast | questions a second | other answers | peak memory |",
        "|---" * 6 + "|",
    ]
    for timing in bench.timings:
        memory = "–" if timing.peak_bytes is None else f"{timing.peak_bytes / 2**30:.2f} GiB"
        set_of = f"{timing.questions}, {QUESTION_SETS[timing.questions][0]} a picture"
        figures = f"{timing.ratio:.2f} | {timing.questions_per_second:.1f} | {timing.other_answers:.0%} | {memory}"
        lines.append(f"| {set_of} | {timing.name} | {figures} |")
    return "\n".join(lines)


def draw_speeds(bench: EvalBench, path: str | Path):
    """Draws the questions a second as bars."""
    from matplotlib import pyplot as plt

    names = [f"{timing.questions}: {timing.name}" for timing in bench.timings]
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(names) + 1))
    axes.barh(names, [timing.questions_per_second for timing in bench.timings])
    axes.invert_yaxis()
    axes.set_xlabel(f"questions a second ({bench.clock})")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def main(argv: Sequence[str] | None = None):
    """Times what the command line asks for."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", help="checkpoint folder or hub id; by default one with new weights is made")
    parser.add_argument("--config", default="llava", help=f"sizes of what is made: {', '.join(CONFIGS)}")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of runs for each option")
    parser.add_argument("--questions", type=int, default=24, help="questions of each set, a multiple of 6")
    arguments = parser.parse_args(argv)
    options = arguments.options or tuple(OPTIONS)
    bench = run_eval_bench(
        arguments.model, arguments.config, arguments.pairs, arguments.device, options, arguments.questions
    )
    show(bench, table(bench), asdict(bench), draw_speeds, arguments)


if __name__ == "__main__":
    main()
