"""Per image, its tokens and its picture: the one thing the feedback must know of a vision tower."""

import inspect
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence

# Arguments of tower calls that pack, pad or tile pictures, and what to call that layout in an error message.
_OTHER_LAYOUTS = {
    "grid_thw": "packed native-resolution patches (the Qwen-VL family)",
    "image_sizes": "padded pictures of different sizes (Pixtral)",
    "pixel_position_ids": "positioned patches (Gemma 4)",
    "spatial_shapes": "padded patches (LFM2-VL)",
    "aspect_ratio_ids": "tiles that attend to each other (Llama 3.2 Vision)",
    "target_sizes": "patch strips (MiniCPM-V)",
    "patch_attention_mask": "padded pictures with a patch mask (SmolVLM, Idefics)",
}


@dataclass
class ImageViews:
    """
    What the feedback reads of one call of a vision tower. Images may differ in size and in number of tokens.

    Args:
        tokens (`list[torch.Tensor]`): For each image its tokens on the autograd graph, `(tokens, dim)`.
        pictures (`list[torch.Tensor]`): For each image its picture as the tower saw it, `(3, height, width)`,
            normalised with the processor's mean and std.
        pooled (`torch.Tensor`, *optional*): The tower's pooled vectors on the autograd graph, `(images, dim)`.
        maps (`dict[str, torch.Tensor]`, *optional*): Its multi-scale maps, each `(images, dim, height, width)`.
    """

    tokens: list[torch.Tensor]
    pictures: list[torch.Tensor]
    pooled: torch.Tensor | None = None
    maps: dict[str, torch.Tensor] | None = None

    def padded_tokens(self):
        """Returns the tokens as `(images, tokens, dim)` and the mask `(images, tokens)`; None if none is padded."""
        lengths = [len(tokens) for tokens in self.tokens]
        if len(set(lengths)) == 1:
            return torch.stack(self.tokens), None
        padded = pad_sequence(self.tokens, batch_first=True)
        positions = torch.arange(padded.shape[1], device=padded.device)
        return padded, positions < torch.tensor(lengths, device=padded.device)[:, None]


@dataclass
class TokenReading:
    """
    Which of a tower's outputs its VLM reads, so that the feedback acts on the same tokens and on no others.

    A class token that the language model never sees would be a hiding place: the tower could store there what the
    denoiser asks for, and the language model would gain nothing.

    Args:
        layers (`list[int]`): Indices into `hidden_states`; empty for `last_hidden_state`.
        drop_class_token (`bool`): Whether the VLM drops the first token.
    """

    layers: list[int] = field(default_factory=list)
    drop_class_token: bool = False

    @classmethod
    def of(cls, config) -> "TokenReading":
        """Reads it from a VLM's config."""
        layers = getattr(config, "vision_feature_layer", None)
        if layers is None:
            layers = getattr(config, "vision_feature_layers", None)
        layers = [] if layers is None else [layers] if isinstance(layers, int) else list(layers)
        always_drops = config.model_type in ("vipllava", "video_llava")
        strategy = getattr(config, "vision_feature_select_strategy", None)
        return cls(layers, always_drops or strategy == "default")

    def select(self, output) -> torch.Tensor:
        """Returns the tokens that the VLM reads of a tower's output, `(images, tokens, dim)`."""
        if self.layers and output.hidden_states is not None:
            tokens = torch.cat([output.hidden_states[layer] for layer in self.layers], dim=-1)
        else:
            tokens = output.last_hidden_state
        return tokens[:, 1:] if self.drop_class_token else tokens


def call_arguments(tower, args, kwargs) -> dict:
    """Returns the arguments of a call of `tower.forward` by name."""
    bound = inspect.signature(tower.forward).bind(*args, **kwargs).arguments
    return {**bound.pop("kwargs", {}), **bound}


def image_views(inputs, output, reading) -> ImageViews:
    """
    Takes one call of a vision tower apart into images.

    The layout is told by the names of the call's arguments, not by the model's name. The grid layout (one picture of
    fixed size a row, tiles included) is known; a new layout is one more function chosen here.

    Args:
        inputs (`dict`): Arguments of the tower's call, by name.
        output (`ModelOutput`): What the tower returned.
        reading (`TokenReading`): Which of it the VLM reads.

    Raises:
        ValueError: If the tower lays out its pictures in a way that is not known.
    """
    for name, layout in _OTHER_LAYOUTS.items():
        if inputs.get(name) is not None:
            raise ValueError(
                f"The vision tower was called with `{name}`: {layout}. The feedback knows towers that take "
                f"`pixel_values` of shape (images, 3, height, width), such as CLIP, SigLIP, DINOv2 and DEEM's own."
            )
    pixel_values = inputs.get("pixel_values")
    if pixel_values is None or pixel_values.dim() != 4 or pixel_values.shape[1] != 3:
        given = "nothing" if pixel_values is None else f"shape {tuple(pixel_values.shape)}"
        raise ValueError(
            f"The vision tower was called with `pixel_values` of {given}; the feedback expects (images, 3, height, "
            f"width)."
        )
    tokens = reading.select(output)
    if len(tokens) != len(pixel_values):
        raise ValueError(
            f"The vision tower gave tokens of shape {tuple(tokens.shape)} for {len(pixel_values)} pictures; the "
            f"feedback expects (images, tokens, dim)."
        )
    pooled, maps = getattr(output, "pooler_output", None), getattr(output, "maps", None)
    return ImageViews(list(tokens), list(pixel_values.detach()), pooled, maps)
