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
    What became of the pictures of a data set.

    Args:
        new (`int`): Encoded and written now.
        known (`int`): In the cache from an earlier run.
        duplicates (`int`): Seen before in this run; one entry serves them all.
    """

    new: int = 0
    known: int = 0
    duplicates: int = 0

    def __str__(self) -> str:
        return f"{self.new} pictures encoded, {self.known} were already there, {self.duplicates} were duplicates."


def main(name: str, overrides=(), batch_size: int = 16) -> str:
    """Fills the cache of the recipe `name`; what `deem cache-latents` runs. Returns what to print."""
    recipe = load_recipe(name, overrides)
    return f"{cache_latents(recipe, batch_size)} Latents are in {recipe.feedback.latent_cache}."


def cache_latents(recipe: Recipe, batch_size: int = 16, generator=None) -> Counts:
    """
    Walks a recipe's data once, as training would see it, and keeps what the VAE says of each picture.

    Pictures that are already there are skipped, so that an interrupted run goes on where it stopped.

    Args:
        recipe (`Recipe`): With `feedback.latent_cache` set to the folder to fill.
        batch_size (`int`, *optional*, defaults to 16): Examples that are read and encoded together.
        generator (`DiffusionModel`, *optional*): Loaded from `feedback.denoiser` by default.

    Raises:
        ValueError: If the recipe has no feedback or names no folder, or the folder belongs to another generator.
    """
    from tqdm import tqdm

    from deem_plugin.feedback.callback import normalization
    from deem_plugin.feedback.factory import load_judge
    from deem_plugin.feedback.latent_cache import LatentCache, LatentWriter, fingerprint, picture_keys
    from deem_plugin.feedback.objectives import unnormalize

    config, args = recipe.feedback, recipe.training
    if config is None or config.latent_cache is None:
        raise ValueError(
            f"The recipe {recipe.name!r} names no cache to fill. Give it the section `feedback` with a `denoiser`, "
            f"and add `feedback.latent_cache=FOLDER`."
        )
    dataset, collator, processor = _data(recipe)
    mean, std = normalization(config, processor)
    # The denoiser only says how large its latents are.
    generator = load_judge(replace(config, quantization=None)) if generator is None else generator
    generator.codec.to(args.device)
    expected = fingerprint(generator)
    counts, done = Counts(), set()
    loader = DataLoader(dataset, batch_size, collate_fn=collator, num_workers=args.dataloader_num_workers)
    with LatentWriter(config.latent_cache, expected) as writer:
        known = LatentCache(config.latent_cache, expected)
        for batch in tqdm(loader, desc="latents", disable=args.disable_tqdm):
            if "pixel_values" not in batch:  # texts alone
                continue
            pixel_values = batch["pixel_values"].flatten(0, -4)  # tiles, where a processor cuts pictures into them
            pictures = unnormalize(_as_cast(pixel_values, args), mean, std).to(args.device)
            keys = picture_keys(pictures)
            new = {key: index for index, key in enumerate(keys) if key not in known and key not in done}
            counts.new += len(new)
            counts.known += len({key for key in keys if key in known and key not in done})
            counts.duplicates += len(keys) - len(set(keys) - done)
            done.update(keys)
            if new:
                means, deviations = generator.posterior(pictures[list(new.values())])
                for place, key in enumerate(new):
                    writer.add(key, means[place], None if deviations is None else deviations[place])
    return counts


def _data(recipe: Recipe):
    """Returns data set, collator and processor of a recipe, as the run has them."""
    from deem_plugin.data.collator import ConversationCollator, ImageCollator
    from deem_plugin.data.conversations import load_conversations
    from deem_plugin.data.images import load_image_folder
    from deem_plugin.training.encoder import load_encoder
    from deem_plugin.training.model import make_model

    data = recipe.data
    if recipe.model.encoder:
        *_, processor = load_encoder(recipe.model)
        return load_image_folder(data.path, data.cache_dir), ImageCollator(processor), processor
    # The model is not asked, but which tower is mounted decides what its processor does.
    _, processor = make_model(recipe.model)
    dataset = load_conversations(data.path, data.image_dir, data.cache_dir)
    return dataset, ConversationCollator(processor, data.max_length), processor


def _as_cast(pixel_values, args):
    """Returns pixels as FSDP hands them to the model: under mixed precision it casts all inputs."""
    if args.fsdp and (args.bf16 or args.fp16):
        return pixel_values.to(torch.bfloat16 if args.bf16 else torch.float16)
    return pixel_values
