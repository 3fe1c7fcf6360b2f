"""One rank of a run with or without a cache: `torchrun -m tests.feedback.run_cached FOLDER MODEL [CACHE]`."""

import json
import sys
from pathlib import Path

from deem_plugin.feedback import DiffusionFeedbackCallback
from tests.feedback.helpers import feedback_config, train


def main(folder, diffusion_model, cache=None):
    """Trains two steps on one sample a rank and keeps the losses that are logged."""
    config = feedback_config(diffusion_model={"path": diffusion_model, "latent_cache": cache})
    trainer, _ = train(
        folder,
        DiffusionFeedbackCallback(config),
        max_steps=2,
        per_device_train_batch_size=1,
        ddp_backend="gloo",
        ddp_find_unused_parameters=True,
    )
    assert trainer.accelerator.num_processes == 2
    if trainer.is_world_process_zero():
        names = ("loss", "feedback_loss")
        losses = [[row[name] for name in names] for row in trainer.state.log_history if "loss" in row]
        (Path(folder) / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(*sys.argv[1:])
