import pytest
import torch

from deem_plugin.feedback.conditioner import Conditioner
from deem_plugin.feedback.conditions import condition_tokens

from .helpers import views_of


@pytest.fixture
def views():
    rng = torch.Generator().manual_seed(0)
    tokens, pooled = torch.randn(3, 9, 8, generator=rng), torch.randn(3, 8, generator=rng)
    return views_of(tokens, pooled=pooled)


def test_queries_and_patches_are_the_tokens_that_the_language_model_reads(views):
    for condition in ("queries", "patches"):
        tokens, mask, _ = condition_tokens(views, condition)
        assert torch.equal(tokens, torch.stack([view.tokens for view in views])) and mask is None


def test_cls_is_the_pooled_vector(views):
    tokens, mask, _ = condition_tokens(views, "cls")

    assert torch.equal(tokens[:, 0], torch.stack([view.pooled for view in views])) and mask is None


def test_random_patches_are_distinct_differ_between_pictures_and_are_reproducible(views):
    tokens, *_ = condition_tokens(views, "cls+patches", 4, torch.Generator().manual_seed(1))
    again, *_ = condition_tokens(views, "cls+patches", 4, torch.Generator().manual_seed(1))

    assert torch.equal(tokens, again) and torch.equal(tokens[:, 0], torch.stack([view.pooled for view in views]))
    chosen = [[views[row].tokens.eq(token).all(-1).nonzero().item() for token in tokens[row, 1:]] for row in range(3)]
    assert all(len(set(places)) == 4 for places in chosen)
    assert len({tuple(places) for places in chosen}) > 1
    assert condition_tokens(views, "cls+patches")[0].shape == (3, 10, 8)


def test_what_the_tower_does_not_give_is_an_error(views):
    with pytest.raises(ValueError, match="`num_patches` is 10, but the tower gives 9 tokens"):
        condition_tokens(views, "cls+patches", 10)
    views[1].pooled = None
    with pytest.raises(ValueError, match="asks for the tower's pooled vector, and it gives none"):
        condition_tokens(views, "cls")


def test_a_pooled_vector_makes_one_context_token_and_the_denoisers_vector():
    conditioner = Conditioner(8, 20, mlp=True, vector_dim=12)
    pooled = torch.randn(3, 1, 8)

    assert conditioner(pooled).shape == (3, 1, 20) and conditioner.vector(pooled).shape == (3, 12)
    assert Conditioner(8, 20).vector(pooled) is None


def test_genhancers_projectors_have_the_published_size():
    """1.18 M and 19.9 M parameters for CLIP's 768 (https://arxiv.org/abs/2503.19480, by its code)."""
    with torch.device("meta"):
        conditioner = Conditioner(768, 4096, mlp=True, vector_dim=768)

    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    assert round(count(conditioner.vector_head) / 1e6, 2) == 1.18
    assert round(count(conditioner.head) / 1e6, 1) == 19.9


def test_visual_tokens_are_added_to_the_prompt_by_position_or_to_its_mean():
    conditioner = Conditioner(8, 20, prompt_tokens=5)
    conditioner.prompt_states.copy_(torch.randn(5, 20))
    torch.nn.init.zeros_(conditioner.head.bias)

    def context(length):
        return conditioner(torch.zeros(2, length, 8))

    states = conditioner.prompt_states
    torch.testing.assert_close(context(5), states.expand(2, -1, -1))
    torch.testing.assert_close(context(1), states.expand(2, -1, -1))
    torch.testing.assert_close(context(3), states.mean(0).expand(2, 3, -1))
    assert "prompt_states" in conditioner.state_dict() and not states.requires_grad


def test_the_head_starts_near_zero_unless_a_prompt_already_makes_a_condition():
    torch.manual_seed(0)

    assert Conditioner(64, 256).head.weight.std().item() == pytest.approx(1e-3, rel=0.1)
    assert Conditioner(64, 256, prompt_tokens=3).head.weight.std().item() == pytest.approx(0.125 / 3**0.5, rel=0.1)
