"""From the settings of a feedback to its parts."""

import torch

from .conditioner import Conditioner
from .conditions import dense_maps
from .contrastive import ContrastiveFeedback
from .diffusion_feedback import DiffusionFeedback
from .diffusion_model import load_diffusion_model
from .prompts import prompt_states
from .synchroniser import UNET_KEYS
from .timesteps import TIMESTEP_SAMPLERS
from .token_denoiser import TokenDenoiser
from .views import image_views
from .weighting import LOSS_WEIGHTINGS


def load_judge(config, *, weights=True):
    """
    Loads the frozen generator of a feedback, in the precision and for the pictures that its settings ask for.

    Args:
        config (`FeedbackConfig`): The settings.
        weights (`bool`, *optional*, defaults to `True`): As for [`load_diffusion_model`].
    """
    return load_diffusion_model(
        config.denoiser,
        config.dtype,
        weights=weights,
        image_size=config.image_size,
        quantization=config.quantization if weights else None,
    )


def make_objective(config, denoiser):
    """Returns the feedback that `config.objective` names, on a denoiser."""
    sampler = TIMESTEP_SAMPLERS[config.timestep_sampling]
    if config.objective == "contrastive":
        return ContrastiveFeedback(denoiser, sampler, config.num_negatives, official_defects=config.official_defects)
    return DiffusionFeedback(denoiser, sampler, config.draws_per_image, LOSS_WEIGHTINGS[config.loss_weighting])


def make_conditioner(config, tower, reading, scorer):
    """
    Makes a conditioner, drawn from `config.seed`; the global random numbers stay as they are.

    Args:
        config (`FeedbackConfig`): The settings.
        tower (`nn.Module`): The vision tower, whose device and dtype it gets.
        reading (`TokenReading`): Which of the tower's outputs it reads.
        scorer: A feedback or a denoiser: its `context_dim` and, where it has one, `vector_dim`.
    """
    # A tower that resamples already gives the very queries that the language model reads.
    resampled = getattr(tower.config, "num_queries", 0) > 0
    pooled_only = config.condition == "cls"
    prompt = None
    if config.prompt is not None:
        prompt = prompt_states(config.denoiser, config.prompt, scorer.context_dim)
    resampler = {}
    if config.condition in ("queries", "queries+dense") and not resampled:
        resampler = {
            "num_queries": config.num_queries,
            "resampler_dim": config.resampler_dim,
            "resampler_layers": config.resampler_layers,
            "resampler_heads": config.resampler_heads,
        }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        conditioner = Conditioner(
            tower.config.hidden_size * (1 if pooled_only else max(1, len(reading.layers))),
            scorer.context_dim,
            **resampler,
            mlp=pooled_only,
            vector_dim=getattr(scorer, "vector_dim", 0) if pooled_only else 0,
            prompt_tokens=0 if prompt is None else len(prompt),
            synchroniser=_synchroniser(tower, reading, scorer) if config.shows_maps else None,
        )
    if prompt is not None:
        conditioner.prompt_states.copy_(prompt)
    return _placed_like(conditioner, tower)


def make_token_denoiser(config, decoder, width, channels):
    """
    Makes the denoiser of `source: llm`, drawn from `config.seed`; the global random numbers stay as they are.

    Args:
        config (`FeedbackConfig`): The settings.
        decoder (`nn.Module`): The language model, whose device and dtype it gets.
        width (`int`): Width of its hidden states.
        channels (`int`): Of the latents.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        denoiser = TokenDenoiser(
            width,
            channels * config.token_cells**2,
            width=config.resampler_dim,
            layers=config.resampler_layers,
            heads=config.resampler_heads,
        )
    return _placed_like(denoiser, decoder)


def _synchroniser(tower, reading, scorer):
    """Returns the arguments of the synchroniser between the tower's maps and the denoiser's UNet."""
    unet = getattr(scorer, "denoiser", scorer).model
    if any(name not in unet.config for name in UNET_KEYS):
        raise ValueError(
            f"`condition: queries+dense` lets the UNet of a Stable Diffusion look at the tower's maps, and this "
            f"generator is a {type(unet).__name__}. Set `feedback.condition` to queries, or choose another generator."
        )
    size, parameter = tower.config.image_size, next(tower.parameters())
    blank = {"pixel_values": torch.zeros(1, 3, size, size, dtype=parameter.dtype, device=parameter.device)}
    with torch.no_grad():
        views = image_views(blank, tower(**blank, output_hidden_states=bool(reading.layers)), reading)
    maps = dense_maps(views)
    shape = {name: unet.config[name] for name in UNET_KEYS}
    return {
        # As JSON gives it back.
        "unet": {name: list(value) if isinstance(value, tuple) else value for name, value in shape.items()},
        "feature_dim": maps[0].shape[1],
        "num_levels": len(maps),
    }


def _placed_like(module, other):
    parameter = next(other.parameters())
    return module.to(device=parameter.device, dtype=parameter.dtype)
