import torch
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from deem_plugin.data.image_collator import ImageCollator

from ..tiny import IMAGE_SIZE, tiny_image, tiny_image_processor


def test_images_alone_become_pixel_values():
    batch = ImageCollator(tiny_image_processor())([{"image": tiny_image(0)}, {"image": tiny_image(1, (40, 60))}])

    assert set(batch) == {"pixel_values"}
    assert batch["pixel_values"].shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)


def test_both_views_of_an_image_are_one_random_crop_and_white_stays_white():
    """One picture in [0, 1], two normalisations: white is exactly 1 for a VAE and black exactly -1."""
    collate = ImageCollator(tiny_image_processor(), crop_area=0.5, target_size=2 * IMAGE_SIZE)
    plain = [Image.new("RGB", (50, 40), color) for color in ("white", "black")]

    examples = [{"image": image, "seed": 0} for image in (tiny_image(0, (90, 60)), *plain)]
    batch = collate([examples[0] | {"seed": 1}, *examples])

    targets, seen = batch["target_pixel_values"], batch["pixel_values"]
    assert targets.shape == (4, 3, 2 * IMAGE_SIZE, 2 * IMAGE_SIZE) and seen.shape[-1] == IMAGE_SIZE
    assert (targets[2] == 1).all() and (targets[3] == -1).all()
    assert not torch.equal(targets[0], targets[1])
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    for target, view in zip(targets, seen, strict=True):
        small = torch.nn.functional.interpolate(target[None], IMAGE_SIZE, mode="bicubic", antialias=True)[0]
        torch.testing.assert_close(view * std + mean, small / 2 + 0.5, atol=0.02, rtol=0)


def test_a_crop_without_a_target_has_the_encoders_size():
    batch = ImageCollator(tiny_image_processor(), crop_area=0.9)([{"image": tiny_image(0, (90, 60)), "seed": 3}])

    assert set(batch) == {"pixel_values"} and batch["pixel_values"].shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)


def test_a_crop_depends_on_the_seed_of_its_example_alone():
    """A resumed run has drawn other numbers before, and reads the example in another batch."""
    collate = ImageCollator(tiny_image_processor(), crop_area=0.5)
    examples = [{"image": tiny_image(0, (90, 60)), "seed": seed} for seed in range(3)]
    torch.manual_seed(0)
    first = collate(examples)["pixel_values"]
    state = torch.get_rng_state()

    again = collate(examples[2:])["pixel_values"]

    assert torch.equal(first[2:], again) and not torch.equal(first[1], first[2])
    assert torch.equal(torch.get_rng_state(), state)
