"""Random numbers of a seed, without a trace in the global generators."""

from contextlib import contextmanager

import torch


@contextmanager
def cpu_seed(seed: int):
    """A context in which the CPU's generator draws from `seed`; `torch.manual_seed` would seed every GPU, too."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield
