"""
One of two gloo ranks, for the tests of weight and of FSDP:
`torchrun --nproc_per_node 2 -m tests.feedback.run_two_ranks FOLDER MODE`.
"""

import sys
from pathlib import Path

import torch

from tests.feedback.runs import logged, run, undrawn_callback
from tests.feedback.test_weight import rows_of_ranks
from tests.tiny import tiny_llava


def train_by_ddp(folder, kind):
    """Trains one step, two micro-batches of one sample a rank."""
    trainer, (gradients,) = run(
        folder,
        undrawn_callback(),
        rows=rows_of_ranks(tiny_llava()[1], kind),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        ddp_backend="gloo",
        # LLaVA's layer -2 leaves parameters unused, and text alone the whole tower.
        ddp_find_unused_parameters=True,
    )
    assert trainer.accelerator.num_processes == 2
    gradients = {name.removeprefix("module."): value for name, value in gradients.items()}
    return trainer.is_world_process_zero(), {
        "gradients": gradients,
        "feedback_loss": logged(trainer, "feedback_loss")[0],
    }


if __name__ == "__main__":
    is_writer, result = train_by_ddp(sys.argv[1], sys.argv[2])
    if is_writer:
        torch.save(result, Path(sys.argv[1]) / "rank0.pt")
