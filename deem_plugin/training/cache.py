"""Fills the latent cache of a recipe: `deem cache-latents`."""

import logging
from dataclasses import dataclass, replace

import torch
from torch.utils.data import DataLoader

from deem_plugin.training.recipes import Recipe, load_recipe

logger = logging.getLogger(__name__)


@dataclass
class Counts:
    """
    What became of the pictures of a data set: `new` ones were encoded and written now, `known` ones are in the cache
    from an earlier run, `duplicates` were seen before in this run, and one entry serves them all.
    """

    new: int = 0
    known: int = 0
    duplicates: int = 0

    def __str__(self) -> str:
        return f"{self.new} pictures encoded, {self.known} were already there, {self.duplicates} were duplicates."


def main(name: str, overrides=(), batch_size: int = 16) -> str:
    """Fills the cache of the recipe `name`; what `deem cache-latents` runs. Returns what to print."""
    recipe = load_recipe(name, overrides)
    return f"{cache_latents(recipe, batch_size)} Latents are in {recipe.feedback.diffusion_model.latent_cache}."


def cache_latents(recipe: Recipe, batch_size: int = 16, diffusion_model=None) -> Counts:
    """
    Walks a recipe's data once, as training would see it, and keeps what the VAE says of each picture. Pictures that
    are already there are skipped, so that an interrupted run goes on where it stopped.

    Args:
        recipe (`Recipe`): With `feedback.diffusion_model.latent_cache` set to the folder to fill.
        batch_size (`int`, *optional*, defaults to 16): Examples that are read and encoded together.
        diffusion_model (`DiffusionModel`, *optional*): Loaded from `feedback.diffusion_model.path` by default.

    Raises:
        ValueError: If the recipe has no feedback or names no folder, or the folder belongs to another diffusion model.
    """
    from tqdm import tqdm

    from deem_plugin.feedback.config import FeedbackConfig
    from deem_plugin.feedback.factory import load_configured
    from deem_plugin.feedback.latent_cache import LatentCache, LatentWriter, fingerprint, picture_keys
    from deem_plugin.vision.eyes import Eyes

    config, args = recipe.feedback, recipe.training
    if not isinstance(config, FeedbackConfig) or config.diffusion_model.latent_cache is None:
        raise ValueError(
            f"The recipe {recipe.name!r} names no cache to fill. Give it the section `feedback` with a "
            f"`diffusion_model`, and add `feedback.diffusion_model.latent_cache=FOLDER`."
        )
    held = config.diffusion_model
    dataset, collator, model, processor = _data(recipe)
    eyes = Eyes.of(model, processor, config.image_mean, config.image_std)
    model.to(args.device)
    # The denoiser only says how large its latents are.
    diffusion_model = load_configured(replace(held, quantization=None)) if diffusion_model is None else diffusion_model
    diffusion_model.codec.to(args.device)
    expected = fingerprint(diffusion_model)
    counts, done = Counts(), set()
    loader = DataLoader(dataset, batch_size, collate_fn=collator, num_workers=args.dataloader_num_workers)
    with LatentWriter(held.latent_cache, expected) as writer:
        known = LatentCache(held.latent_cache, expected)
        for batch in tqdm(loader, desc="latents", disable=args.disable_tqdm):
            if "pixel_values" not in batch:  # texts alone
                continue
            pictures = [view.picture.clamp(0, 1)[None] for view in eyes.show(model, _as_cast(batch, args))]
            keys = [key for picture in pictures for key in picture_keys(picture)]
            new = {key: index for index, key in enumerate(keys) if key not in known and key not in done}
            counts.new += len(new)
            counts.known += len({key for key in keys if key in known and key not in done})
            counts.duplicates += len(keys) - len(set(keys) - done)
            done.update(keys)
            if new:
                fitted = torch.cat([diffusion_model.resize(pictures[index]) for index in new.values()])
                means, deviations = diffusion_model.codec.posterior(fitted * 2 - 1)
                for place, key in enumerate(new):
                    deviation = None if deviations is None else deviations[place]
                    if not all(value.isfinite().all() for value in (means[place], deviation) if value is not None):
                        raise ValueError(
                            f"The autoencoder of `feedback.diffusion_model.path: {held.path}` gives latents of a "
                            f"picture (key {key[:16]}) that are not finite. None of them are kept: use an autoencoder "
                            f"whose weights do not overflow."
                        )
                    writer.add(key, means[place], deviation)
    return counts


def _data(recipe: Recipe):
    """Returns data set, collator, model and processor of a recipe, as the run has them."""
    from deem_plugin.data.collator import ConversationCollator
    from deem_plugin.data.image_collator import ImageCollator
    from deem_plugin.training.data import load_examples
    from deem_plugin.training.encoder import load_encoder
    from deem_plugin.training.model import make_model

    if recipe.model.encoder:
        _, tower, processor = load_encoder(recipe.model)
        return load_examples(recipe), ImageCollator(processor), tower, processor
    model, processor = make_model(recipe.model)
    return load_examples(recipe), ConversationCollator(processor, recipe.data.max_length), model, processor


def _as_cast(batch, args):
    """Returns pixels as FSDP hands them to the model: under mixed precision it casts all inputs."""
    if not (args.fsdp and (args.bf16 or args.fp16)):
        return batch
    dtype = torch.bfloat16 if args.bf16 else torch.float16
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
