import torch

from deem_plugin.feedback.second_view import augment, augment_as_published


def test_the_augmented_view_stays_a_picture_close_to_the_first():
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 32), torch.linspace(0, 1, 32), indexing="ij")
    pictures = torch.stack([rows, columns, rows * columns]).expand(4, -1, -1, -1)

    views = augment(pictures, torch.Generator().manual_seed(0))

    assert views.shape == pictures.shape and views.min() >= 0 and views.max() <= 1
    assert 0 < (views - pictures).abs().mean() < 0.1
    assert not torch.allclose(views[0], views[1])
    # Never flipped: left stays left and top stays top.
    assert (views[:, 1, :, -8:].mean(dim=(1, 2)) > views[:, 1, :, :8].mean(dim=(1, 2))).all()
    assert (views[:, 0, -8:].mean(dim=(1, 2)) > views[:, 0, :8].mean(dim=(1, 2))).all()


def test_it_depends_on_the_seed_alone_and_leaves_the_global_generator():
    pictures = torch.rand(2, 3, 16, 16)
    state = torch.get_rng_state()

    first, second = (augment(pictures, torch.Generator().manual_seed(3)) for _ in range(2))

    assert torch.equal(first, second) and torch.equal(state, torch.get_rng_state())


def test_as_published_all_that_is_darker_than_the_mean_is_lost():
    normalised = torch.randn(2, 3, 16, 16)

    assert augment_as_published(normalised, torch.Generator().manual_seed(0)).min() >= 0
