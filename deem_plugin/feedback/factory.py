"""From the settings of a feedback and a model to the parts that compute it."""

from dataclasses import dataclass

import torch
from torch import nn

from ..seeding import cpu_seed
from ..vision.eyes import Eyes
from .anchor import Anchor
from .balance import Balance
from .checkpoint import read_conditioner
from .conditioner import Conditioner
from .conditions import dense_maps
from .config import ConditionConfig, DiffusionModelConfig, FeedbackConfig, ObjectiveConfig, RossConfig
from .contrastive import ContrastiveFeedback
from .denoisers import check_context_dim
from .diffusion_feedback import DiffusionFeedback
from .diffusion_model import load_autoencoder, load_diffusion_model
from .hook import FeedbackHook, TowerSource, check_reached
from .latent_cache import LatentCache, fingerprint
from .loss import FeedbackLoss
from .optimizations import apply_optimizations
from .prompts import prompt_states
from .ross import DecoderSource, RossLoss
from .synchroniser import UNET_KEYS
from .timesteps import LOSS_WEIGHTINGS, TIMESTEP_SAMPLERS
from .token_denoiser import TokenBlocks, TokenDenoiser


@dataclass
class Feedback:
    """
    All that a feedback needs, built before anything of the model is changed.

    Args:
        conditioner (`Conditioner` or `TokenDenoiser`): What trains along, and is left behind when the model is saved.
        hook (`FeedbackHook`): Computes the feedback.
    """

    conditioner: nn.Module
    hook: FeedbackHook

    @property
    def diffusion_model(self):
        """The frozen diffusion model."""
        return self.hook.loss.diffusion_model


def build_feedback(
    config: FeedbackConfig | RossConfig, model, processor, diffusion_model, objective, conditioner_ref
) -> Feedback:
    """
    Builds the feedback of a model. Changes nothing of it.

    Args:
        config (`FeedbackConfig` or `RossConfig`): The settings.
        model (`nn.Module`): The VLM, or an encoder alone; not the PEFT model around it.
        processor: Tells the normalisation of its pictures.
        diffusion_model, objective (*optional*): What `config` names by default.
        conditioner_ref (`Callable`): Returns the conditioner as it is in the model, which wrappers may have replaced.

    Raises:
        ValueError: If the model has no eyes that the feedback knows, its tower is frozen, or settings do not fit.
    """
    # The eyes first: what cannot be trained is refused before the diffusion model is loaded.
    eyes = Eyes.of(model, processor, config.image_mean, config.image_std)
    if isinstance(config, RossConfig):
        return _build_ross(config, model, eyes, diffusion_model, objective, conditioner_ref)
    if not config.conditioner_only:
        check_reached(eyes)
    held = config.diffusion_model
    if diffusion_model is None:
        diffusion_model = load_configured(held)
    if held.latent_cache is not None:
        diffusion_model.latent_cache = LatentCache(held.latent_cache, fingerprint(diffusion_model))
    if objective is None:
        objective = make_objective(config.objective, diffusion_model.denoiser)
    conditioner = make_conditioner(config.condition, eyes, objective, seed=config.seed, text_encoder=held.path)
    check_context_dim(conditioner.arguments["context_dim"], objective)
    if config.conditioner is not None:
        conditioner.load_state_dict(read_conditioner(config.conditioner, conditioner))
    loss = FeedbackLoss(diffusion_model, objective, config.condition, eyes, config.max_views_per_image)
    if held.cpu_offload and not loss.is_frozen:
        raise ValueError(
            f"`cpu_offload` needs an objective whose `denoiser` is frozen, so that its gradient can be taken before "
            f"the weights leave, and a {type(objective).__name__} has none. Leave `cpu_offload` out."
        )
    apply_optimizations(diffusion_model, held)
    hook = FeedbackHook(
        TowerSource(eyes),
        loss,
        conditioner_ref,
        in_eval=config.in_eval,
        checks=not config.conditioner_only,
        anchor=Anchor(eyes.tower) if config.anchor_weight else None,
        anchor_weight=config.anchor_weight,
        share=config.share,
        balance=None if config.balance is None else Balance(config.balance, config.weight),
    )
    return Feedback(conditioner, hook)


def _build_ross(config, model, eyes, autoencoder, objective, conditioner_ref) -> Feedback:
    if autoencoder is None:
        autoencoder = load_autoencoder(config.autoencoder)
    decoder = model.get_decoder()
    width = model.config.get_text_config().hidden_size
    denoiser = make_token_denoiser(config, decoder, width, autoencoder.codec.channels)
    if objective is None:
        blocks = TokenBlocks(conditioner_ref, width, config.token_cells)
        objective = make_objective(config.objective, blocks)
    loss = RossLoss(autoencoder, objective, config.token_cells)
    return Feedback(denoiser, FeedbackHook(DecoderSource(eyes, decoder), loss, conditioner_ref, config.in_eval))


def load_configured(config: DiffusionModelConfig, *, weights=True):
    """
    Loads the frozen diffusion model of a feedback, in the precision and for the pictures that its settings ask for;
    `weights` as for [`load_diffusion_model`].
    """
    return load_diffusion_model(
        config.path,
        config.dtype,
        weights=weights,
        autoencoder=config.autoencoder,
        image_size=config.image_size,
        quantization=config.quantization if weights else None,
    )


def make_objective(config: ObjectiveConfig, denoiser):
    """Returns the objective that its settings name, on a denoiser."""
    sampler = TIMESTEP_SAMPLERS[config.timestep_sampling]
    if config.kind == "contrastive":
        return ContrastiveFeedback(denoiser, sampler, config.num_negatives)
    return DiffusionFeedback(denoiser, sampler, config.draws_per_image, LOSS_WEIGHTINGS[config.loss_weighting])


def make_conditioner(condition: ConditionConfig, eyes: Eyes, scorer, *, seed=0, text_encoder=None) -> Conditioner:
    """
    Makes a conditioner; the global random numbers stay as they are.

    Args:
        condition (`ConditionConfig`): The settings.
        eyes (`Eyes`): Of the model, whose tower's device and dtype it gets.
        scorer: An objective or a denoiser: its `context_dim` and, where it has one, `vector_dim`.
        seed (`int`, *optional*, defaults to `0`): Of its initial weights.
        text_encoder (`str`, *optional*): Folder or hub id of the diffusion model whose text encoder reads a prompt.
    """
    # A tower that resamples already gives the very queries that the language model reads.
    resampled = getattr(eyes.tower.config, "num_queries", 0) > 0
    pooled_only = condition.kind == "cls"
    prompt = None
    if condition.prompt is not None:
        prompt = prompt_states(text_encoder, condition.prompt, scorer.context_dim)
    resampler = {}
    if condition.kind in ("queries", "queries+dense") and not resampled:
        resampler = {
            "num_queries": condition.num_queries,
            "resampler_dim": condition.resampler_dim,
            "resampler_layers": condition.resampler_layers,
            "resampler_heads": condition.resampler_heads,
            "positions": eyes.layout.needs_positions,
        }
    with cpu_seed(seed):
        conditioner = Conditioner(
            (eyes.pooled_width or eyes.width) if pooled_only else eyes.width,
            scorer.context_dim,
            **resampler,
            mlp=pooled_only,
            vector_dim=getattr(scorer, "vector_dim", 0) if pooled_only else 0,
            prompt_tokens=0 if prompt is None else len(prompt),
            synchroniser=_synchroniser(eyes, scorer) if condition.shows_maps else None,
        )
    if prompt is not None:
        conditioner.prompt_states.copy_(prompt)
    return _placed_like(conditioner, eyes.tower)


def make_token_denoiser(config: RossConfig, decoder, width, channels) -> TokenDenoiser:
    """
    Makes ROSS's denoiser for a language model `decoder` with hidden states of `width` and latents of so many channels,
    drawn from `config.seed`; the global random numbers stay as they are.
    """
    with cpu_seed(config.seed):
        denoiser = TokenDenoiser(
            width,
            channels * config.token_cells**2,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
        )
    return _placed_like(denoiser, decoder)


def _synchroniser(eyes, scorer):
    """Returns the arguments of the synchroniser between the tower's maps and the denoiser's UNet."""
    unet = getattr(scorer, "denoiser", scorer).model
    if any(name not in unet.config for name in UNET_KEYS):
        raise ValueError(
            f"`condition.kind: queries+dense` lets the UNet of a Stable Diffusion read the tower's maps, and this "
            f"denoiser is a {type(unet).__name__}. Set `feedback.condition.kind` to queries, or choose another one."
        )
    size = eyes.tower.config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    with torch.no_grad():
        maps = dense_maps(eyes.look([torch.zeros(3, height, width, device=next(eyes.tower.parameters()).device)]))
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
