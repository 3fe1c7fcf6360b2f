"""Trains a vision encoder alone on images (DIVA's setting, https://arxiv.org/abs/2407.20171): loading and saving."""

import torch

from deem_plugin.training.arguments import ModelArguments
from deem_plugin.training.parts import freeze_unused


def load_encoder(arguments: ModelArguments, reads_pooled: bool = False):
    """
    Loads the encoder of a recipe.

    Args:
        arguments (`ModelArguments`): The recipe's section `model`, with `encoder` set.
        reads_pooled (`bool`, *optional*, defaults to `False`): As in [`vision_part`].

    Returns:
        `tuple[PreTrainedModel, PreTrainedModel, BaseImageProcessor]`: What the checkpoint holds (a whole CLIP with
        its text tower, for example), the vision encoder in it, which trains, and the image processor.
    """
    from transformers import AutoImageProcessor, AutoModel

    # Registers our classes with transformers, so that our own towers load.
    import deem_plugin.vision  # noqa: F401

    options = {"dtype": arguments.dtype}
    if arguments.attn_implementation is not None:
        options["attn_implementation"] = arguments.attn_implementation
    whole = AutoModel.from_pretrained(arguments.encoder, **options)
    # CLIP and SigLIP: the text tower stays as it is and is kept, so that zero-shot evaluation remains possible.
    tower = vision_part(whole, reads_pooled)
    return whole, tower, AutoImageProcessor.from_pretrained(arguments.encoder)


def vision_part(whole, reads_pooled: bool = False):
    """
    Returns the vision encoder of what [`load_encoder`] loads; what the feedback does not read of it is frozen.

    Args:
        whole (`PreTrainedModel`): The encoder, or a model with one and a text tower.
        reads_pooled (`bool`, *optional*, defaults to `False`): Whether the feedback reads the pooled vector too.
    """
    tower = whole.vision_model if hasattr(whole.config, "vision_config") else whole
    size = tower.config.image_size
    with torch.enable_grad():
        blank = torch.zeros(1, 3, size, size, dtype=tower.dtype, device=tower.device)
        output = tower(pixel_values=blank)
        features = output.last_hidden_state.flatten()
        if reads_pooled and output.pooler_output is not None:
            features = torch.cat([features, output.pooler_output.flatten()])
        # CLIP's last norm, for example, serves the pooled vector only.
        freeze_unused(tower.named_parameters(), features)
    return tower


def save_encoder(whole, image_processor, folder: str):
    """
    Saves the checkpoint in the class that it was loaded in, with the trained vision encoder in it.

    Args:
        whole (`PreTrainedModel`): What [`load_encoder`] returned first; its vision encoder has been trained in place.
        image_processor (`BaseImageProcessor`): Saved beside it.
        folder (`str`): Where to.
    """
    from deem_plugin.feedback.callback import CONDITIONER_NAME

    # While it trains, the conditioner is a part of the vision encoder, and no part of what is saved.
    weights = {name: value for name, value in whole.state_dict().items() if CONDITIONER_NAME not in name.split(".")}
    whole.save_pretrained(folder, state_dict=weights)
    image_processor.save_pretrained(folder)
