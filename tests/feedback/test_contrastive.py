import math

import pytest
import torch
import torch.nn.functional as F

from deem_plugin.feedback import load_diffusion_model
from deem_plugin.feedback.contrastive import ContrastiveFeedback

from .tiny_diffusion_models import CONTEXT_DIM, SIZE, save_diffusion_model


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory):
    return load_diffusion_model(save_diffusion_model(tmp_path_factory.mktemp("sd1"), "sd1")).denoiser


@pytest.fixture
def inputs():
    rng = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 4, 4, SIZE, SIZE, generator=rng)
    context, second = torch.randn(2, 4, 5, CONTEXT_DIM, generator=rng)
    return {
        "latents": latents,
        "context": context,
        "second_view": (second, None),
        "noise": noise,
        "timesteps": torch.tensor([10, 300, 600, 900]),
    }


def by_hand(denoiser, inputs, negatives, target):
    """The formula of the paper, one picture and one run at a time."""
    noisy = denoiser.noise(inputs["latents"], inputs["noise"], inputs["timesteps"])

    def predict(row, context):
        return denoiser(noisy[row : row + 1], inputs["timesteps"][row : row + 1], context[None]).flatten()

    losses = []
    for row in range(4):
        anchor = predict(row, inputs["context"][row])
        positive = predict(row, inputs["second_view"][0][row])
        others = [predict(row, inputs["context"][(row + 1 + step) % 4]) for step in range(negatives)]
        scores = [
            F.cosine_similarity(anchor, other, dim=0).item() / 0.1
            for other in [positive, target[row].flatten(), *others]
        ]
        total = sum(math.exp(score) for score in scores)
        losses.append(-0.5 * sum(math.log(math.exp(score) / total) for score in scores[:2]))
    return torch.tensor(losses)


@pytest.mark.parametrize("num_negatives", [None, 1])
def test_the_loss_is_the_papers_formula(denoiser, inputs, num_negatives):
    loss = ContrastiveFeedback(denoiser, num_negatives=num_negatives)(**inputs)

    expected = by_hand(denoiser, inputs, 3 if num_negatives is None else 1, inputs["noise"])
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)


def test_the_published_target_is_the_velocity_of_an_epsilon_model(denoiser, inputs):
    loss = ContrastiveFeedback(denoiser, official_defects=True)(**inputs)

    velocity = denoiser.scheduler.get_velocity(inputs["latents"], inputs["noise"], inputs["timesteps"])
    torch.testing.assert_close(loss, by_hand(denoiser, inputs, 3, velocity), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(loss, ContrastiveFeedback(denoiser)(**inputs), atol=1e-2)


def test_a_condition_that_says_the_same_of_every_picture_gets_a_pull_apart(denoiser, inputs):
    same = inputs["context"][:1].repeat(4, 1, 1).requires_grad_()

    loss = ContrastiveFeedback(denoiser)(**{**inputs, "context": same, "second_view": (same, None)})
    loss.mean().backward()

    # Predictions are all alike: the positive and three negatives share the probability that the target leaves.
    assert loss.min() > 0.5 and same.grad.abs().sum(dim=(1, 2)).min() > 0


def test_one_picture_has_nothing_to_be_compared_with(denoiser, inputs):
    alone = {key: value[:1] for key, value in inputs.items() if key != "second_view"}

    with pytest.raises(ValueError, match="this one holds a single one. Set `training.per_device_train_batch_size`"):
        ContrastiveFeedback(denoiser)(**alone, second_view=(inputs["second_view"][0][:1], None))
