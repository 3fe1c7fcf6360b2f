"""Where a vision-language model keeps its vision tower."""

from torch import nn
from transformers import GenerationMixin, PreTrainedModel


def find_tower(model: nn.Module) -> nn.Module:
    """
    Finds the vision tower of any Hugging Face vision-language model, also behind PEFT.

    Args:
        model (`nn.Module`): A vision-language model, or a vision model by itself, which then is the tower.

    Raises:
        `ValueError`: If the model has none, as a text-only or an encoder-free model.
    """
    if is_encoder(model):
        return model
    config = getattr(model, "config", None)
    if hasattr(model, "get_encoder"):
        tower = _unwrapped(model.get_encoder(modality="image"))
        # Where transformers finds none it returns the model itself, or its text encoder.
        if isinstance(tower, nn.Module) and not _is_whole(tower, config) and not _embeds_text(tower):
            return tower
    vision_config = getattr(config, "vision_config", None)
    if vision_config is not None:
        for module in model.modules():
            if getattr(module, "config", None) is vision_config:
                return _unwrapped(module)
    encoders = vision_encoders(model)
    if encoders:
        return next(iter(encoders.values()))
    raise ValueError(
        f"Found no vision tower in {type(model).__name__}. It must be a Hugging Face vision-language model with an "
        f"image encoder of its own: models that embed pixels directly (encoder-free) and text-only models have none "
        f"that feedback could train."
    )


def is_encoder(model: nn.Module) -> bool:
    """Tells whether a model is a vision encoder by itself, not a vision-language model."""
    modalities = tuple(getattr(model, "input_modalities", None) or ())
    return modalities == ("image",) and not isinstance(model, GenerationMixin)


def vision_encoders(model: nn.Module) -> dict[str, PreTrainedModel]:
    """Returns the models within a model that take pictures and no text, by name; the outermost of each branch."""
    found = {}
    for name, module in model.named_modules():
        if module is model or any(name.startswith(f"{outer}.") for outer in found):
            continue
        if isinstance(module, PreTrainedModel) and module.main_input_name == "pixel_values":
            if not _embeds_text(module):
                found[name] = module
    return found


def without_peft(model: nn.Module) -> nn.Module:
    """Returns the transformers model inside a PEFT model, or the model itself."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def _is_whole(tower, config) -> bool:
    """Tells whether `get_encoder` gave the model or its language part in place of a tower."""
    own = getattr(tower, "config", None)
    if own is config:
        return True
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else None
    return own is not None and own is text_config


def _embeds_text(module) -> bool:
    """Whether a module begins with words, as a language model or an encoder of pictures and text does."""
    try:
        return isinstance(module.get_input_embeddings(), nn.Embedding)
    except (AttributeError, NotImplementedError):
        return False


def _unwrapped(module):
    """Returns the module that trains inside the wrapper of PEFT's `modules_to_save`."""
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        return module.modules_to_save[module.active_adapters[0]]
    return module
