"""
Measures what shared image features gain on a LLaVA whose tower is most of the work, as that of a real one is.

    python -m tests.evaluation.benchmark_features [CHECKPOINT]

Asks two questions a picture, as RobustVQA does, and six, as POPE does, with shared features and without in turn;
checks that the answers are the same. The questions of a picture have different lengths, so they fall into different
batches, too. Without a checkpoint the model is made here: a CLIP of 12 layers on 14 x 14 patches, a tiny Llama.
"""

import logging
import sys
import tempfile
import time

import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from deem_plugin.evaluation.lmms import DeemChat

from ..tiny import tiny_image, tiny_llama_config, tiny_processor
from .helpers import request

SIZE, PATCH = 224, 16  # pixels
BATCH_SIZE = 8
QUESTIONS = {"RobustVQA, 2 questions a picture": (48, 2), "POPE, 6 questions a picture": (16, 6)}
REPEATS = 3
GENERATION = {"max_new_tokens": 4, "do_sample": False, "temperature": 0}


def save_model(folder: str) -> str:
    """Saves the tower-heavy LLaVA."""
    torch.manual_seed(0)
    processor = tiny_processor()
    processor.image_processor = CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    processor.patch_size = PATCH
    vision = CLIPVisionConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=SIZE,
        patch_size=PATCH,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=tiny_llama_config(len(processor.tokenizer)),
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def measure(checkpoint: str, pictures: int, each: int, feature_cache_mb: int) -> tuple[float, list[str]]:
    """Returns questions a second, after a warm-up, and the answers."""
    docs = [
        {"image": tiny_image(index, (SIZE, SIZE)), "question": f"Is there {'a big ' * number}dog in the image?"}
        for index in range(pictures)
        for number in range(each)
    ]

    def to_messages(doc: dict) -> list[dict]:
        parts = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": doc["question"]}]
        return [{"role": "user", "content": parts}]

    model = DeemChat(pretrained=checkpoint, batch_size=BATCH_SIZE, feature_cache_mb=feature_cache_mb)
    warm_up = {"image": tiny_image(pictures, (SIZE, SIZE)), "question": "Is it warm?"}
    model.task_dict = {"task": {"test": [*docs, warm_up]}}
    requests = [
        request(doc["question"], to_messages, GENERATION, index, "task", "test")
        for index, doc in enumerate([*docs, warm_up])
    ]
    model.generate_until(requests[-1:])
    start = time.perf_counter()
    answers = model.generate_until(requests[:-1])
    return len(docs) / (time.perf_counter() - start), answers


def main(checkpoint: str | None = None) -> None:
    """Writes a line for each kind of question set to standard output."""
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = checkpoint or save_model(folder)
        for name, (pictures, each) in QUESTIONS.items():
            runs = {0: [], 512: []}
            for _ in range(REPEATS):
                for megabytes, measured in runs.items():
                    measured.append(measure(checkpoint, pictures, each, megabytes))
            # The best of each: whatever else the machine does only ever makes a run slower.
            plain, shared = (max(speed for speed, _ in measured) for measured in runs.values())
            (_, expected), *others = [run for measured in runs.values() for run in measured]
            same = "the same answers" if all(run == expected for _, run in others) else "DIFFERENT ANSWERS"
            sys.stdout.write(
                f"{name}: {plain:.1f} questions/s without, {shared:.1f} with shared features "
                f"({shared / plain:.2f} times), {same}\n"
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
