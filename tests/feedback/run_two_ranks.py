"""
One of two gloo ranks, for the tests of weight and of FSDP:
`torchrun --nproc_per_node 2 -m tests.feedback.run_two_ranks FOLDER MODE`.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerControl, TrainerState

from deem_plugin.feedback import load_conditioner, save_conditioner
from tests.feedback.helpers import arguments, samples
from tests.feedback.runs import collate, logged, rows_of_ranks, run, undrawn_callback
from tests.tiny import tiny_llava


def whole(tensor):
    """Returns a tensor that may be sharded, put together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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
    return {"gradients": gradients, "feedback_loss": logged(trainer, "feedback_loss")[0]}


def attached(shard=True, **settings):
    """Returns a model with feedback, its callback and its processor; sharded over both ranks layer by layer."""
    model, processor = tiny_llava()
    callback = undrawn_callback(**settings)
    callback.attach(model, processor)
    if shard:
        mesh = init_device_mesh("cpu", (2,))
        for layer in [*model.model.vision_tower.encoder.layers, *model.model.language_model.layers]:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model.train(), callback, processor


def train_by_fsdp(folder):
    """The gradients of a step of two samples a rank, the saved conditioner, and what is read of it again."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model, callback, processor = attached()
    assert any(isinstance(value, DTensor) for value in callback.conditioner.parameters())
    callback.hook.state.scale = callback.config.weight / 2  # conversations of a rank, whose gradients are averaged
    model(**collate(samples(processor)[2 * rank : 2 * rank + 2])).loss.backward()
    callback.hook.check_injected()
    gradients = {name: whole(value.grad) for name, value in model.named_parameters() if value.grad is not None}

    expected = {name: whole(value).clone() for name, value in callback.conditioner.state_dict().items()}
    save_conditioner(callback.conditioner, callback.config, folder, write=rank == 0)
    dist.barrier()
    saved = load_conditioner(folder)[0].state_dict()
    with torch.no_grad():
        for parameter in callback.conditioner.parameters():
            parameter.zero_()
    callback.load(folder)
    loaded = {name: whole(value) for name, value in callback.conditioner.state_dict().items()}
    still_sharded = all(isinstance(value, DTensor) for value in callback.conditioner.parameters())

    callback.detach()
    left = sorted(name for name in model.state_dict() if "feedback" in name)
    return {
        "gradients": gradients,
        "expected": expected,
        "saved": saved,
        "loaded": loaded,
        "still_sharded": still_sharded,
        "left": left,
    }


def gradients_of_a_share(rank, shard):
    """
    The gradients of a call in which half of the images are restored, rounded down: one of the two of rank 0, none of
    the one of rank 1.
    """
    model, callback, processor = attached(shard, share=0.5)
    callback.hook.state.scale = callback.config.weight
    model(**collate(samples(processor)[2:] if rank == 0 else samples(processor)[:1])).loss.backward()
    callback.hook.check_injected()
    return {name: whole(value.grad) for name, value in model.named_parameters() if value.grad is not None}


def share_by_fsdp(folder):
    """The gradients of [`gradients_of_a_share`] on both ranks, averaged by FSDP."""
    dist.init_process_group("gloo")
    return gradients_of_a_share(dist.get_rank(), shard=True)


def train_by_events(folder, start=0, shard=True):
    """
    Trains the conditioner alone from step `start` to 4, by the events of a Trainer that has sharded its model before
    it begins; accelerate shards on GPUs only. Four samples a step; saves after the second step.

    Returns:
        `tuple[list[float], dict]`: The logged feedback losses, and the conditioner's weights at the end.
    """
    ranks = 2 if shard else 1
    args = arguments(folder, per_device_train_batch_size=4 // ranks, resume_from_checkpoint=None)
    rank = args.process_index
    model, callback, processor = attached(shard)
    rows = samples(processor)[rank * 4 // ranks : (rank + 1) * 4 // ranks]
    loader = torch.utils.data.DataLoader(rows, batch_size=len(rows))
    optimizer = torch.optim.SGD(callback.conditioner.parameters(), lr=1e-3)
    state, control = TrainerState(global_step=start, train_batch_size=len(rows)), TrainerControl()
    callback.on_train_begin(args, state, control, model=model, optimizer=optimizer, train_dataloader=loader)
    for step in range(start, 4):
        callback.on_step_begin(args, state, control, optimizer=optimizer, train_dataloader=loader)
        loss = model(**collate(rows)).loss
        loss.backward()
        optimizer.step()
        model.zero_grad()
        state.global_step = step + 1
        callback.on_step_end(args, state, control)
        logs = {"loss": loss.item()}
        state.log_history.append(logs)
        callback.on_log(args, state, control, logs=logs, model=model)
        if state.global_step == 2:
            (Path(folder) / "checkpoint-2").mkdir(parents=True, exist_ok=True)
            callback.on_save(args, state, control)
    callback.on_train_end(args, state, control)
    weights = {name: whole(value) for name, value in callback.conditioner.state_dict().items()}
    return [logs["feedback_loss"] for logs in state.log_history], weights


def resume_by_fsdp(folder):
    """A whole run on shards, and its second half again from its checkpoint."""
    arguments(folder)  # makes the group of processes
    losses, weights = train_by_events(folder)
    dist.barrier()
    resumed_losses, resumed_weights = train_by_events(folder, start=2)
    return {
        "losses": losses,
        "weights": weights,
        "resumed_losses": resumed_losses,
        "resumed_weights": resumed_weights,
    }


def main(folder, mode):
    """Runs a mode and lets rank 0 write what it gave."""
    if mode == "fsdp":
        result = train_by_fsdp(folder)
    elif mode == "fsdp share":
        result = share_by_fsdp(folder)
    elif mode == "fsdp resume":
        result = resume_by_fsdp(folder)
    else:
        result = train_by_ddp(folder, mode)
    if dist.get_rank() == 0:
        torch.save(result, Path(folder) / "rank0.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
