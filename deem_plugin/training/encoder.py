"""Trains a vision encoder alone on images (DIVA's setting, https://arxiv.org/abs/2407.20171): loading and saving."""

import copy

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from deem_plugin.files import naming_the_checkpoint
from deem_plugin.hub import at_revision
from deem_plugin.training.arguments import ModelArguments
from deem_plugin.training.parts import freeze_names
from deem_plugin.vision.reading import parameters_of


class AlignedEncoder(nn.Module):
    """
    A CLIP's vision encoder in the space that it shares with its text tower: every token is normed and projected, the
    patches as `last_hidden_state` and the class token as `pooler_output`. DIVA, GenHancer and DCR show the diffusion
    model such tokens. `whole` is a model with a `vision_model` and a `visual_projection`, whose parts these are, so
    that it trains with them.
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
    Returns what the checkpoint of a recipe's `model.encoder` holds (a whole CLIP with its text tower, for example),
    the vision encoder in it, which trains, and the image processor. `reads_pooled` as in [`vision_part`].
    """
    from transformers import AutoImageProcessor, AutoModel

    import deem_plugin.vision.auto  # noqa: F401  # so that our own towers load

    with naming_the_checkpoint(*arguments.source()):
        whole = AutoModel.from_pretrained(**at_revision(arguments.encoder), **arguments.loading())
        image_processor = AutoImageProcessor.from_pretrained(**at_revision(arguments.encoder))
    # CLIP and SigLIP: the text tower stays as it is and is kept, so that zero-shot evaluation remains possible.
    tower = vision_part(whole, reads_pooled)
    return whole, tower, image_processor


def vision_part(whole, reads_pooled: bool = False):
    """
    Returns the vision encoder of what [`load_encoder`] loads; what the feedback does not read of it is frozen. If it
    `reads_pooled`, the pooled vector too, that of a CLIP is as it is compared with text.
    """
    tower = whole.vision_model if hasattr(whole.config, "vision_config") else whole
    if reads_pooled and hasattr(whole, "visual_projection"):
        tower = AlignedEncoder(whole)
    size = tower.config.image_size
    with torch.enable_grad():
        output = tower(pixel_values=torch.zeros(1, 3, size, size, dtype=tower.dtype, device=tower.device))
        pooled = [output.pooler_output] if reads_pooled and output.pooler_output is not None else []
        # CLIP's last norm, for example, serves the pooled vector only.
        read = parameters_of(tower, [output.last_hidden_state, *pooled])
    freeze_names(tower, {name for name, _ in tower.named_parameters()} - read)
    return tower


def save_encoder(whole, image_processor, folder: str):
    """
    Saves a checkpoint that [`load_encoder`] returned, whose vision encoder has been trained in place, in its own
    class, and its image processor beside it.
    """
    from deem_plugin.feedback.callback import CONDITIONER_NAME

    # While it trains, the conditioner is a part of the vision encoder, and no part of what is saved.
    weights = {name: value for name, value in whole.state_dict().items() if CONDITIONER_NAME not in name.split(".")}
    whole.save_pretrained(folder, state_dict=weights)
    image_processor.save_pretrained(folder)
