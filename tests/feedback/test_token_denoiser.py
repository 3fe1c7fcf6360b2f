import pytest
import torch

from deem_plugin.feedback import DiffusionFeedback
from deem_plugin.feedback.ross import grid_of
from deem_plugin.feedback.token_denoiser import TokenBlocks, TokenDenoiser
from deem_plugin.vision.views import View


def tiny_blocks(**settings):
    torch.manual_seed(0)
    network = TokenDenoiser(8, 4 * settings.get("cells", 2) ** 2, width=16, layers=2, heads=2)
    return network, TokenBlocks(lambda: network, 8, **settings)


@pytest.mark.parametrize(("token_dim", "millions"), [(3584, 63.9), (5120, 65.5)])
def test_it_has_the_size_of_the_published_head(token_dim, millions):
    with torch.device("meta"):
        network = TokenDenoiser(token_dim, 64)

    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 1) == millions


def test_it_starts_at_zero_and_each_token_answers_for_its_own_block():
    network, blocks = tiny_blocks()
    latents, tokens = torch.randn(1, 4, 6, 6), torch.randn(1, 9, 8)
    timesteps = torch.tensor([500])
    assert not blocks(latents, timesteps, tokens).any()

    def read_own_block(noisy, timesteps, tokens, grid):
        """Returns in each block the number of the token that was given it."""
        assert grid == (3, 3)
        return torch.arange(9.0).view(1, 9, 1).expand_as(noisy)

    blocks.network = lambda: read_own_block
    predicted = blocks(latents, timesteps, tokens)
    expected = torch.arange(9.0).view(3, 3).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(predicted, expected.expand(1, 4, 6, 6))
    blocks.network = lambda: lambda noisy, *others: noisy
    assert torch.equal(blocks(latents, timesteps, tokens), latents)


@pytest.mark.parametrize(
    ("tokens", "size", "grid"),
    [(16, (32, 32), (4, 4)), (8, (32, 32), (2, 4)), (8, (64, 32), (4, 2)), (24, (64, 96), (4, 6))],
)
def test_tokens_of_a_picture_make_the_grid_nearest_to_its_proportions(tokens, size, grid):
    assert grid_of(View(torch.zeros(tokens, 8), torch.zeros(3, *size), 0)) == grid


def test_a_class_token_or_separators_make_no_grid():
    with pytest.raises(ValueError, match="reads 17 tokens of a picture of 32 x 32 pixels, which are no grid"):
        grid_of(View(torch.zeros(17, 8), torch.zeros(3, 32, 32), 0))


def test_the_loss_falls_when_it_alone_is_trained():
    network, blocks = tiny_blocks()
    feedback = DiffusionFeedback(blocks, draws=4)
    latents = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    tokens = torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)

    def loss(seed):
        return feedback(latents, tokens, generator=torch.Generator().manual_seed(seed)).mean()

    before = loss(99).item()
    for step in range(50):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
    assert loss(99).item() < 0.9 * before
