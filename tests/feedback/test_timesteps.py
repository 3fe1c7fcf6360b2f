import json

import pytest
import torch
from safetensors.torch import load_file

from deem_plugin.feedback.timesteps import TIMESTEP_SAMPLERS, shrink_timesteps

STEPS = 1000


@pytest.mark.parametrize("name", TIMESTEP_SAMPLERS)
def test_timesteps_are_integers_of_the_schedule_and_follow_the_diffusion_model(name):
    sampler = TIMESTEP_SAMPLERS[name]

    first = sampler(4096, STEPS, generator=torch.Generator().manual_seed(1))
    second = sampler(4096, STEPS, generator=torch.Generator().manual_seed(1))

    assert first.dtype == torch.long and first.shape == (4096,)
    assert first.min() >= 0 and first.max() < STEPS
    assert torch.equal(first, second)


def test_shrink_keeps_to_the_middle_sixty_percent():
    timesteps = TIMESTEP_SAMPLERS["shrink"](20_000, STEPS, generator=torch.Generator().manual_seed(0))

    assert timesteps.min() == 200 and timesteps.max() == 799


def test_shrink_equals_the_official_map_at_every_timestep(shared_dir):
    mapped = shrink_timesteps(torch.arange(STEPS), STEPS)

    stored = json.loads((shared_dir / "parity/f1_inverted_noise.json").read_text())
    assert mapped[stored["t"]].tolist() == stored["mapped"]
    tensors = load_file(shared_dir / "parity/f1_scheduler.safetensors")
    assert torch.equal(mapped, tensors["inverted_noise"].long())


def test_logit_normal_is_denser_in_the_middle():
    timesteps = TIMESTEP_SAMPLERS["logit_normal"](20_000, STEPS, generator=torch.Generator().manual_seed(0))

    middle = ((timesteps >= 250) & (timesteps < 750)).float().mean().item()
    expected = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(3.0).log()).item() * 2 - 1
    assert middle == pytest.approx(expected, abs=0.02)
