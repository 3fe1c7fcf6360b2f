import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from deem_plugin.planning.memory import (
    GPUS,
    ZERO_BUCKET,
    OptimizerStates,
    Weight,
    communication_memory,
    find_gpu,
    state_memory,
)
from deem_plugin.planning.report import main

ADAMW = OptimizerStates(per_element=2, per_tensor=4)
WEIGHTS = [Weight((10, 7), 4, True), Weight((5,), 4, True), Weight((3, 3), 2, False)]
TRAINED, FROZEN = 75, 9  # elements


def exact(memory):
    """Returns weights, gradients and optimizer."""
    return memory.weights, memory.gradients, memory.optimizer


@pytest.mark.parametrize("gpus", [1, 8])
def test_under_ddp_each_gpu_holds_everything(gpus):
    expected = (4 * TRAINED + 2 * FROZEN, 4 * TRAINED, 2 * 4 * TRAINED + 2 * 4)
    assert exact(state_memory(WEIGHTS, ADAMW, "ddp", gpus, mixed_precision=True)) == expected


def test_zero_follows_its_paper():
    """With K = 12 bytes a weight: ZeRO-2 takes 2 P + (2 + 12) P / N, ZeRO-3 all of it by N (Rajbhandari et al.)."""
    weights = [Weight((1000, 16), 4, True)]
    elements, gpus = 16_000, 8
    two = state_memory(weights, OptimizerStates(2, 0), "zero2", gpus, mixed_precision=True)
    three = state_memory(weights, OptimizerStates(2, 0), "zero3", gpus, mixed_precision=True)

    assert sum(exact(two)) == 2 * elements + (2 + 12) * elements // gpus
    assert sum(exact(three)) == (2 + 2 + 12) * elements // gpus


@pytest.fixture
def eight_ranks():
    """A process group of eight of which this process is the first; nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield torch.distributed.init_device_mesh("cpu", (8,))
    torch.distributed.destroy_process_group()


def test_fsdp_is_what_fully_shard_leaves_on_the_first_rank(eight_ranks):
    from torch.distributed.fsdp import fully_shard

    # Sizes that eight divides, that it does not, and that are smaller than eight.
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 13), nn.Linear(13, 3))
    model[1].requires_grad_(False)
    weights = [Weight(tuple(p.shape), p.element_size(), p.requires_grad) for p in model.parameters()]
    for layer in (*model, model):
        fully_shard(layer, mesh=eight_ranks)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()

    def local(tensors):
        return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)

    states = [value for state in optimizer.state.values() for value in state.values()]
    measured = (
        local(model.parameters()),
        local(p.grad for p in model.parameters() if p.grad is not None),
        local(states),
    )
    assert exact(state_memory(weights, ADAMW, "fsdp2", 8, mixed_precision=False)) == measured


def test_fsdp_holds_what_trains_in_float32_when_it_computes_in_less():
    weights = [Weight((8, 2), 2, True), Weight((8, 2), 2, False)]
    memory = state_memory(weights, ADAMW, "fsdp2", 2, mixed_precision=True)
    assert exact(memory) == (4 * 8 + 2 * 8, 4 * 8, 2 * 4 * 8 + 4)


def test_one_gpu_sends_nothing_and_buckets_have_a_largest_size():
    shape = {"mixed_precision": True, "root": 10, "unit": 100}
    assert communication_memory(WEIGHTS, "fsdp2", 1, **shape) == 0
    assert communication_memory(WEIGHTS, "ddp", 2, **shape) == 4 * TRAINED
    assert communication_memory(WEIGHTS, "fsdp2", 2, **shape) == 2 * (2 * 10 + 3 * 100)
    huge = [Weight((10 * ZERO_BUCKET,), 4, True)]
    assert communication_memory(huge, "zero2", 2, **shape) == 2 * ZERO_BUCKET * 2


def test_a_total_is_the_sum_of_its_kinds():
    memory = state_memory(WEIGHTS, ADAMW, "ddp", 1, mixed_precision=False)
    memory.diffusion_model, memory.activations, memory.communication = 1, 10, 100
    assert memory.total == sum(exact(memory)) + 111 + memory.context


def test_an_unknown_gpu_is_an_error_that_lists_the_known():
    assert find_gpu("H100") == GPUS["h100"]
    with pytest.raises(ValueError, match=r"Unknown GPU 'h1000'. Known: t4, .*--gpu-memory GIB"):
        find_gpu("h1000")


@pytest.mark.parametrize("settings", [{"gpus": [0]}, {"memory_gib": float("nan")}, {"memory_gib": -1.0}])
def test_no_gpus_and_no_memory_are_errors(settings):
    with pytest.raises(ValueError, match="Cannot plan for .* Give numbers above 0"):
        main("tiny-tune", [], **settings)
