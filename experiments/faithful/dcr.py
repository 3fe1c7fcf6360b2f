"""
DCR with two defects of its published code: `python -m experiments.faithful.dcr [section.key=value ...]`, or behind
`accelerate launch -m`. Without the defects it is the recipe `dcr`.
"""

import logging
import sys
from pathlib import Path

from deem_plugin.feedback.contrastive import ContrastiveFeedback, augmentation, seeded
from deem_plugin.training.recipes import load_recipe
from deem_plugin.training.run import train

RECIPE = Path(__file__).with_name("dcr-faithful.yaml")


class PublishedContrastiveFeedback(ContrastiveFeedback):
    """
    The loss as published: its target is the velocity whatever the diffusion model predicts, and the positive view is
    augmented when it is normalised already, which clamps it to [0, 1] and so wipes out all that is darker than the
    mean, and flipped in both directions.
    """

    def target(self, latents, noise, timesteps):
        """Returns the velocity, shape of `latents`."""
        return self.denoiser.scheduler.get_velocity(latents, noise, timesteps)

    def augment(self, picture, eyes, generator):
        """Augments what the tower is shown of a picture `(3, height, width)` in [0, 1]."""
        from torchvision.transforms import v2

        colours, crop = augmentation(picture.shape[-2:]).transforms
        transform = v2.Compose([colours, v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), crop])
        return eyes.unnormalize(seeded(transform, eyes.normalize(picture), generator))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train(load_recipe(RECIPE, sys.argv[1:]), PublishedContrastiveFeedback)
