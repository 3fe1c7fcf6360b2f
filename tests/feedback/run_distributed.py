"""One rank of the two-process test; run by `torchrun --nproc_per_node 2 -m tests.feedback.run_distributed FOLDER`."""

import sys
from pathlib import Path

import torch

from tests.feedback.helpers import keyed_callback, train


def main(folder, gradient_checkpointing):
    """Trains one step on two samples a rank and saves the gradients of rank 0."""
    trainer, (gradients,) = train(
        folder,
        keyed_callback(),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        ddp_backend="gloo",
        gradient_checkpointing=gradient_checkpointing,
        # With checkpointing the Trainer no longer looks for unused parameters; LLaVA's layer -2 leaves some unused.
        ddp_find_unused_parameters=True,
    )
    assert trainer.accelerator.num_processes == 2
    if trainer.is_world_process_zero():
        gradients = {name.removeprefix("module."): value for name, value in gradients.items()}
        losses = trainer.state.log_history[0]
        torch.save({"gradients": gradients, "feedback_loss": losses["feedback_loss"]}, Path(folder) / "rank0.pt")


if __name__ == "__main__":
    main(sys.argv[1], "checkpoint" in sys.argv[2:])
