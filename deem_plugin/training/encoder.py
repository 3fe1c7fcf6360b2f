"""Trains a vision encoder alone on images (DIVA's setting, https://arxiv.org/abs/2407.20171): loading and saving."""

import copy

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from deem_plugin.training.arguments import ModelArguments
from deem_plugin.training.parts import freeze_unused


class AlignedEncoder(nn.Module):
    """
    A CLIP's vision encoder in the space that it shares with its text tower: every token is normed and projected, the
    patches as `last_hidden_state` and the class token as `pooler_output`.

    DIVA, GenHancer and DCR show the diffusion model such tokens. The parts are those of the CLIP, so that it trains
    with it.

    Args:
        whole (`CLIPModel`): Or another model with a `vision_model` and a `visual_projection`.
    """

    # What transformers and peft ask of a vision model.
    input_modalities = ("image",)
    main_input_name = "pixel_values"
    base_model_prefix = ""

    def __init__(self, whole):
        super().__init__()
        self.vision_model = whole.vision_model
        self.visual_projection = whole.visual_projection
        self.config = copy.deepcopy(whole.config.vision_config)
        self.config.hidden_size = whole.visual_projection.out_features

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return self.vision_model.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.vision_model.device

    def forward(self, pixel_values):
        """Reads pictures `(images, 3, height, width)`, normalised; tokens are `(images, patches, projected width)`."""
        states = self.vision_model(pixel_values=pixel_values).last_hidden_state
        tokens = self.visual_projection(self.vision_model.post_layernorm(states))
        return BaseModelOutputWithPooling(last_hidden_state=tokens[:, 1:], pooler_output=tokens[:, 0])


def load_encoder(arguments: ModelArguments, reads_pooled: bool = False):
    """
    Loads the encoder of a recipe.

    Args:
        arguments (`ModelArguments`): The recipe's section `model`, with `encoder` set.
        reads_pooled (`bool`, *optional*, defaults to `False`): As in [`vision_part`].

    Returns:
        `tuple[PreTrainedModel, nn.Module, BaseImageProcessor]`: What the checkpoint holds (a whole CLIP with its text
        tower, for example), the vision encoder in it, which trains, and the image processor.
    """
    from transformers import AutoImageProcessor, AutoModel

    import deem_plugin.vision.auto  # noqa: F401  # so that our own towers load

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
        reads_pooled (`bool`, *optional*, defaults to `False`):
            Whether the feedback reads the pooled vector too; a CLIP's as it is compared with text.
    """
    tower = whole.vision_model if hasattr(whole.config, "vision_config") else whole
    if reads_pooled and hasattr(whole, "visual_projection"):
        tower = AlignedEncoder(whole)
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
