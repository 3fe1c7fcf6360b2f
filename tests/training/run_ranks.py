"""
One gloo rank of a recipe, for the tests of DDP and FSDP:
`torchrun --nproc_per_node N -m tests.training.run_ranks [overrides]` is `deem train tiny-tune`.
"""

import sys
from pathlib import Path

import accelerate.state
import torch.distributed as dist
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

from deem_plugin.training.recipes import load_recipe
from deem_plugin.training.run import train

from ..feedback.runs import UndrawnFeedback


def shard_on_cpus():
    """
    Lets accelerate shard over processes without GPUs.

    It takes its FSDP plugin for kinds of accelerators only and runs DDP elsewhere, in silence. From here on everything
    is the Trainer's and accelerate's own: wrapping, gathering, saving, resuming.
    """
    stock = accelerate.state.AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        stock(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    accelerate.state.AcceleratorState.__init__ = init


class KeepGradients(TrainerCallback):
    """Writes the gradients of the first step to `gradients.safetensors`."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step:
            return
        gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        whole = {
            name.removeprefix("module."): (grad.full_tensor() if isinstance(grad, DTensor) else grad).contiguous()
            for name, grad in gradients.items()
        }
        if args.should_save:
            save_file(whole, Path(args.output_dir) / "gradients.safetensors")


def main(overrides):
    """Trains with a feedback that is a function of the pictures alone, so that ranks need not draw alike."""
    shard_on_cpus()
    DEFAULT_CALLBACKS.append(KeepGradients)
    train(load_recipe("tiny-tune", overrides), lambda denoiser, sample_timesteps: UndrawnFeedback(denoiser))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
