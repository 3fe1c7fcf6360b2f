"""
One gloo rank of a recipe, for the tests of FSDP:
`torchrun --nproc_per_node N -m tests.training.run_sharded [overrides]` is `deem train tiny-tune` with a sharded model.
"""

import sys

import accelerate.state
import torch.distributed as dist
from accelerate.utils import DistributedType

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


def main(overrides):
    """Trains with a feedback that is a function of the pictures alone, so that ranks need not draw alike."""
    shard_on_cpus()
    train(load_recipe("tiny-tune", overrides), lambda denoiser, sample_timesteps: UndrawnFeedback(denoiser))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
