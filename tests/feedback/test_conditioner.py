import pytest
import torch

from deem_plugin.feedback import (
    ConditionConfig,
    Conditioner,
    DiffusionModelConfig,
    FeedbackConfig,
    load_conditioner,
    save_conditioner,
)


def test_patches_become_queries_of_the_denoisers_width():
    conditioner = Conditioner(12, 20, num_queries=5, resampler_dim=8, resampler_heads=2)

    assert conditioner(torch.randn(3, 7, 12)).shape == (3, 5, 20)


def test_padded_tokens_do_not_reach_the_context():
    conditioner = Conditioner(12, 20, num_queries=5, resampler_dim=8, resampler_heads=2).eval()
    tokens = torch.randn(1, 7, 12)
    mask = torch.tensor([[True] * 4 + [False] * 3])

    torch.testing.assert_close(conditioner(tokens, mask), conditioner(tokens[:, :4]))


def test_queries_that_are_resampled_already_go_through_the_head_alone():
    conditioner = Conditioner(12, 20)

    assert [name for name, _ in conditioner.named_parameters()] == ["head.weight", "head.bias"]
    assert conditioner(torch.randn(3, 7, 12)).shape == (3, 7, 20)
    with pytest.raises(ValueError, match="different numbers of visual tokens.*num_queries"):
        conditioner(torch.randn(1, 7, 12), torch.tensor([[True] * 4 + [False] * 3]))


def test_the_conditioner_comes_back_as_it_was_saved(tmp_path):
    conditioner = Conditioner(12, 20, num_queries=5, resampler_dim=8, resampler_heads=2)

    config = FeedbackConfig(DiffusionModelConfig("somewhere"), ConditionConfig(num_queries=5), seed=3)
    save_conditioner(conditioner, config, tmp_path)
    loaded, settings = load_conditioner(tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["feedback.safetensors"]
    assert settings == config and loaded.arguments == conditioner.arguments
    assert all(torch.equal(v, loaded.state_dict()[n]) for n, v in conditioner.state_dict().items())


def test_a_folder_without_feedback_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        load_conditioner(tmp_path)
