"""The interleaved model of a recipe: loaded or assembled, its losses weighted, its diffusion model attached."""

from deem_plugin.files import naming_the_checkpoint
from deem_plugin.hub import at_revision
from deem_plugin.training.arguments import DeemArguments, ModelArguments


def load_deem(arguments: ModelArguments, deem: DeemArguments):
    """
    Returns the DEEM of a recipe (its sections `model` and `deem`), with its diffusion model attached where a loss
    needs one, and its processor.

    Raises:
        ValueError: If `model.model` is no DEEM, or the diffusion model does not fit what was asked for.
    """
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
    )

    import deem_plugin.models  # noqa: F401  # so that the Auto classes know a DEEM
    from deem_plugin.feedback.diffusion_model import load_diffusion_model
    from deem_plugin.vision import build_image_processor

    diffusion_model = None if deem.denoiser is None else load_diffusion_model(deem.denoiser, deem.dtype)
    if arguments.language_model is not None:
        source = at_revision(arguments.language_model)
        with naming_the_checkpoint(*arguments.source()):
            language_model = AutoModelForCausalLM.from_pretrained(**source, **arguments.loading())
            tokenizer = AutoTokenizer.from_pretrained(**source)
        model, processor = assemble(
            arguments, deem, language_model, tokenizer, diffusion_model, arguments.vision_pretrained
        )
    else:
        source = at_revision(arguments.model)
        with naming_the_checkpoint(*arguments.source()):
            config = AutoConfig.from_pretrained(**source)
        config = stage_config(config, arguments)
        with naming_the_checkpoint(*arguments.source()):
            model = AutoModelForImageTextToText.from_pretrained(**source, config=config, **arguments.loading())
            processor = AutoProcessor.from_pretrained(**source)
        processor.image_processor = build_image_processor(config.vision_config, deem.target_size)
    finish(model, deem, diffusion_model)
    return model, processor


def finish(model, deem: DeemArguments, diffusion_model):
    """Gives a DEEM the weights of its losses and its diffusion model."""
    for name in ("lm_weight", "image_weight", "feedback_weight", "feedback_timesteps", "null_context_rate"):
        setattr(model.config, name, getattr(deem, name))
    if diffusion_model is not None:
        model.attach_diffusion_model(diffusion_model)


def stage_config(config, arguments: ModelArguments):
    """Returns the config of a DEEM of an earlier stage as this one reads pictures; raises a `ValueError` on others."""
    from deem_plugin.models import DeemConfig

    if not isinstance(config, DeemConfig):
        raise ValueError(
            f"`model.model: {arguments.model}` is a {config.model_type}, but the recipe has a section `deem`. "
            f"Give a DEEM of an earlier stage, set `model.language_model` to assemble one, or leave `deem` out."
        )
    if arguments.image_size is not None:
        config.vision_config = resized(config.vision_config, arguments.image_size)
    return config


def resized(vision_config, image_size: int):
    """
    Returns a tower's config for pictures of another size. Raises a `ValueError` if the encoder is no ConvNeXt: its
    position embeddings would have to be resized, too.
    """
    from deem_plugin.vision import DeemVisionConfig

    if not vision_config.is_convnext:
        raise ValueError(
            "`model.image_size` of a saved DEEM can change for a ConvNeXt alone. Leave it out, or set it where the "
            "model is assembled."
        )
    kept = {name: value for name, value in vision_config.to_dict().items() if name not in ("image_size", "model_type")}
    return DeemVisionConfig(**kept | {"open_clip_config": vision_config.open_clip_config | {"image_size": image_size}})


def assemble(arguments: ModelArguments, deem: DeemArguments, language_model, tokenizer, diffusion_model, pretrained):
    """Returns a DEEM of a language model and a new tower, `pretrained` as [`build_vision_tower`] takes it."""
    from deem_plugin.feedback.synchroniser import UNET_KEYS
    from deem_plugin.models import assemble_deem
    from deem_plugin.vision import build_vision_tower

    tower = build_vision_tower(
        **arguments.tower(),
        pretrained=pretrained,
        multiscale=deem.language_synchroniser is not None or deem.unet_synchroniser or deem.region_tokens,
        region_tokens=deem.region_tokens,
    )
    unet = None
    if deem.unet_synchroniser:
        config = None if diffusion_model is None else diffusion_model.denoiser.model.config
        if config is None or not all(name in config for name in UNET_KEYS):
            raise ValueError(
                f"`deem.unet_synchroniser` looks into a UNet of Stable Diffusion; `deem.denoiser: {deem.denoiser}` is "
                f"none. Leave it out, or choose another diffusion model."
            )
        unet = {"unet": {name: config[name] for name in UNET_KEYS}}
    return assemble_deem(
        language_model,
        tokenizer,
        tower,
        target_size=deem.target_size,
        context_dim=None if diffusion_model is None else diffusion_model.denoiser.context_dim,
        language_synchroniser=deem.language_synchroniser,
        unet_synchroniser=unet,
    )
