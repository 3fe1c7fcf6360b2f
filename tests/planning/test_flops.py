import gc

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from deem_plugin.planning.flops import MemoryTracker, flop_counter

KIB = 1024


def peak_of(work, *existing):
    """Returns the peak that the tracker sees of `work()`."""
    gc.collect()
    with MemoryTracker(existing) as tracker:
        work()
    return tracker.peak


def test_the_peak_counts_what_lives_at_once_and_nothing_twice():
    def work():
        first = torch.zeros(KIB, dtype=torch.uint8)
        second = first.view(2, -1)  # the same bytes
        second.add_(1)
        third = torch.zeros(2 * KIB, dtype=torch.uint8)
        del first, second, third
        return torch.zeros(KIB, dtype=torch.uint8)

    assert peak_of(work) == 3 * KIB


def test_what_was_there_before_does_not_count():
    old = torch.zeros(KIB, dtype=torch.uint8)
    assert peak_of(lambda: old.view(4, -1).detach(), old) == 0


def layers(checkpointed):
    """Returns weights and a training step of eight layers on 4 KiB of activations a layer."""
    model = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(8))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step():
        states = torch.zeros(32, 32, requires_grad=True)
        for layer in model:

            def block(states, layer=layer):
                return layer(layer(states).relu()).relu()

            states = checkpoint(block, states, use_reentrant=False) if checkpointed else block(states)
        states.sum().backward()

    existing = [*model.parameters(), *(p.grad for p in model.parameters())]
    return existing, step


def test_a_step_keeps_what_backward_needs_and_checkpointing_keeps_less():
    """Four of a layer's tensors are kept (input and output of two linear layers are shared), or its input alone."""
    plain, checkpointed = (peak_of(step, *existing) for existing, step in (layers(False), layers(True)))
    assert 16 * 4 * KIB <= plain <= 24 * 4 * KIB
    assert 8 * 4 * KIB <= checkpointed <= 18 * 4 * KIB
    assert checkpointed < plain


def test_fake_tensors_take_as_much_as_real_ones_would():
    existing, step = layers(checkpointed=True)
    real = peak_of(step, *existing)
    with FakeTensorMode():
        existing, step = layers(checkpointed=True)
        assert peak_of(step, *existing) == real


def test_attention_counts_two_products_forward_and_five_backward():
    """Of queries and keys, of weights and values; backward computes the first anew and has two of each."""
    query = torch.randn(2, 3, 16, 8, requires_grad=True)
    key, value = torch.randn(2, 3, 10, 8, requires_grad=True), torch.randn(2, 3, 10, 8, requires_grad=True)
    product = 2 * (2 * 3) * 16 * 10 * 8

    with flop_counter() as counter:
        attended = F.scaled_dot_product_attention(query, key, value)
        assert counter.get_total_flops() == 2 * product
        attended.sum().backward()
    assert counter.get_total_flops() == (2 + 5) * product
