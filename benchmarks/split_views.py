"""
What it costs to take a call of a vision tower apart: `python benchmarks/split_views.py` (a minute or two on a CPU).

Times the forward pass of Qwen2.5-VL's vision tower at its real widths, and behind each one all that the hook of the
feedback does there but the diffusion model: the arguments of the call by name, its views (tokens, pictures
un-normalised), the injection. CPU seconds of one thread and the ratio of neighbours, so that other work on the machine
counts little. The cost does not grow with the depth of the tower: 32 layers in the published model, a few here.
"""

import argparse
import time
from contextlib import nullcontext
from statistics import median
from types import SimpleNamespace

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from deem_plugin.feedback.hook import FeedbackHook, TowerSource
from deem_plugin.feedback.loss import summarise
from deem_plugin.feedback.state import StepState
from deem_plugin.vision.eyes import Eyes


class NoDiffusion:
    """A loss without a diffusion model: the first value of each view's tokens."""

    diffusion_model = SimpleNamespace(on_device=lambda device: nullcontext())
    is_frozen = True

    def __call__(self, views, conditioner, generator, **options):
        errors = torch.stack([view.tokens[0, 0].float() for view in views])
        kept = torch.zeros(len(views), dtype=torch.bool)
        return summarise(views, errors.sum(), errors.detach(), ~kept, kept, torch.ones(len(views)))


def make_model(depth):
    """Makes a Qwen2.5-VL whose vision tower has the widths of the 3B model, and next to no language model."""
    vision = {
        "depth": depth,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "fullatt_block_indexes": [depth - 1],
    }
    text = {
        "hidden_size": 2048,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    }
    tokens = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(vision_config=vision, text_config=text, **tokens))


def measure(depth=2, side=448, batch=4, repetitions=9):
    """
    Times forward passes and what follows them.

    Args:
        depth (`int`): Layers of the tower.
        side (`int`): Height and width of the pictures, in pixels.
        batch (`int`): Pictures of a call.
        repetitions (`int`): Pairs of times, after one that is not counted.

    Returns:
        `tuple[float, float, float]`: Medians of the seconds of a forward pass, of what follows, and of their ratio.
    """
    torch.manual_seed(0)
    model, processor = make_model(depth), Qwen2VLImageProcessor()
    eyes = Eyes.of(model, processor)
    pictures = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
    inputs = processor(images=list(pictures), return_tensors="pt")
    arguments = (inputs["pixel_values"],), {"grid_thw": inputs["image_grid_thw"]}
    hook = FeedbackHook(TowerSource(eyes), NoDiffusion(), conditioner=lambda: None, checks=False)
    times = []
    for _ in range(repetitions + 1):
        hook.state = StepState(scale=1.0)
        start = time.process_time()
        output = eyes.tower(*arguments[0], **arguments[1])
        middle = time.process_time()
        hook(eyes.tower, *arguments, output)
        times.append((middle - start, time.process_time() - middle))
        assert len(hook.state.pending) == 1
    times = times[1:]
    return median(a for a, _ in times), median(b for _, b in times), median(b / a for a, b in times)


def main():
    """Prints what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--depth", type=int, default=2, help="layers of the tower")
    parser.add_argument("--repetitions", type=int, default=9, help="pairs of times")
    options = parser.parse_args()
    torch.set_num_threads(1)
    forward, split, share = measure(options.depth, repetitions=options.repetitions)
    print(
        f"Qwen2.5-VL's tower, width 1280, {options.depth} layers, 4 pictures of 448 x 448, CPU seconds of one thread: "
        f"forward {forward:.2f} s, split and inject {1000 * split:.1f} ms, {share:.2%} "
        f"(medians of {options.repetitions} pairs)"
    )


if __name__ == "__main__":
    main()
