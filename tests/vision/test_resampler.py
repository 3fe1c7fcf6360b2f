"""The resampler against the official module's numbers, and what its options do."""

import pytest
import torch
from safetensors.torch import load_file

from deem_plugin.vision.resampler import PerceiverResampler
from tests.parity_weights import resampler_weights


def tiny_resampler(**options):
    torch.manual_seed(0)
    shape = {"hidden_dim": 32, "num_queries": 6, "num_layers": 3, "num_heads": 4, "intermediate_dim": 96}
    return PerceiverResampler(48, **(shape | options))


@pytest.fixture
def reference(shared_dir):
    return load_file(shared_dir / "parity" / "f3_perceiver_qknorm.safetensors")


def relative_error(value, expected):
    return ((value - expected).norm() / expected.norm()).item()


def test_resampler_gives_the_numbers_of_the_official_module(reference):
    resampler = tiny_resampler().eval()
    resampler.load_state_dict(resampler_weights(reference, prefix="w."), strict=True)
    tokens = reference["encoder_hidden_states"].requires_grad_()

    out = resampler(tokens)
    (out * reference["cotangent"]).sum().backward()

    torch.testing.assert_close(out, reference["out"], atol=1e-5, rtol=0)
    masked = resampler(tokens, reference["encoder_attention_mask"])
    torch.testing.assert_close(masked, reference["out_masked"], atol=1e-5, rtol=0)
    assert relative_error(tokens.grad, reference["grad_encoder_hidden_states"]) < 1e-4
    assert relative_error(resampler.queries.grad, reference["grad_queries"]) < 1e-4


def test_masked_tokens_do_not_matter():
    resampler = tiny_resampler().eval()
    tokens = torch.randn(2, 5, 48)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    changed = torch.where(mask[..., None].bool(), tokens, torch.full_like(tokens, 9.0))

    torch.testing.assert_close(resampler(tokens, mask), resampler(changed, mask))
    torch.testing.assert_close(resampler(tokens, mask)[:1], resampler(tokens[:1, :3]))


def test_every_parameter_gets_a_gradient():
    resampler = tiny_resampler()
    (resampler(torch.randn(2, 5, 48)) * torch.randn(2, 6, 32)).sum().backward()
    # A key bias shifts every score of a query alike, which softmax ignores; with QK norm it does matter.
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in resampler.parameters())


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="hidden_dim=32 and num_heads=5"):
        tiny_resampler(num_heads=5)
