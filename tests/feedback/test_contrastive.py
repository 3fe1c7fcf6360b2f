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
    noisy = denoiser.process.noise(inputs["latents"], inputs["noise"], inputs["timesteps"])

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


def augmented(picture, generator):
    return ContrastiveFeedback(None).augment(picture, None, generator)


def test_the_augmented_view_stays_a_picture_close_to_the_first():
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 32), torch.linspace(0, 1, 32), indexing="ij")
    pictures = torch.stack([rows, columns, rows * columns]).expand(4, -1, -1, -1)

    generator = torch.Generator().manual_seed(0)
    views = torch.stack([augmented(picture, generator) for picture in pictures])

    assert views.shape == pictures.shape and views.min() >= 0 and views.max() <= 1
    assert 0 < (views - pictures).abs().mean() < 0.1
    assert not torch.allclose(views[0], views[1])
    # Never flipped: left stays left and top stays top.
    assert (views[:, 1, :, -8:].mean(dim=(1, 2)) > views[:, 1, :, :8].mean(dim=(1, 2))).all()
    assert (views[:, 0, -8:].mean(dim=(1, 2)) > views[:, 0, :8].mean(dim=(1, 2))).all()


def test_it_depends_on_the_seed_alone_and_leaves_the_global_generator():
    pictures = torch.rand(2, 3, 16, 16)
    state = torch.get_rng_state()

    first, second = (augmented(pictures, torch.Generator().manual_seed(3)) for _ in range(2))

    assert torch.equal(first, second) and torch.equal(state, torch.get_rng_state())
