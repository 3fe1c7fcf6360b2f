"""HFEncoder: any vision encoder of transformers that gives tokens on a grid; what it gives is measured, not listed."""

import copy
import math

import torch
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..seeding import cpu_seed
from .encoder_output import Encoder, EncoderOutput, Tokens, to_map
from .layouts import layout_of


def own_image_size(encoder: PreTrainedConfig) -> int | None:
    """The side in pixels of the square pictures that an encoder was made for, or `None` where it does not say so."""
    size = getattr(encoder, "image_size", None)
    if size is None and hasattr(encoder, "num_patches"):  # packed patches: of a square of that many
        size = math.isqrt(encoder.num_patches) * encoder.patch_size
    if size is None:  # a model of timm
        size = (getattr(encoder, "pretrained_cfg", None) or {}).get("input_size", [None])[-1]
    if isinstance(size, list | tuple):
        size = size[0] if len(set(size)) == 1 else None
    return size


class HFEncoder(Encoder):
    """
    A vision model of Hugging Face that returns tokens, or a map of them, for `pixel_values`.

    What stands before the patches is told by their number, which is the square of the side of a grid. The first is the
    class token, unless all are registers; registers are left out of the output. An encoder whose layers differ in
    resolution (Swin, ConvNeXt) gives the tokens of its last one.

    Args:
        encoder (`PreTrainedConfig`): Its configuration.
        image_size (`int`): Side of the pictures in pixels; for another than its own, position embeddings are
            interpolated.
        model (`PreTrainedModel`, *optional*): The model, instead of a new one.
    """

    def __init__(self, encoder: PreTrainedConfig, image_size: int, model: PreTrainedModel | None = None):
        super().__init__()
        self.model = AutoModel.from_config(encoder) if model is None else model
        self.layout = layout_of(self.model)
        # The others interpolate unasked, or cannot.
        asks_to_interpolate = "interpolate_pos_encoding" in self.layout.names
        self.interpolate = asks_to_interpolate and image_size != own_image_size(encoder)
        parameters = ((name.split(".")[-1], value) for name, value in self.model.named_parameters())
        registers = [value for name, value in parameters if name.startswith("reg")]
        # DeepSpeed keeps the shape of what it has spread over devices under a name of its own.
        self.num_registers = sum(getattr(value, "ds_shape", value.shape)[-2] for value in registers)
        self.gradient_checkpointing = False

    def _split(self, state: torch.Tensor, batch: int) -> Tokens:
        if state.ndim == 4:
            channels_last = state.shape[1] == state.shape[2] != state.shape[3]
            return Tokens(None, state.flatten(1, 2) if channels_last else state.flatten(2).mT)
        state = state.reshape(batch, -1, state.shape[-1])  # Pixtral has all pictures in one row
        others = state.shape[1] - math.isqrt(state.shape[1]) ** 2
        return Tokens(state[:, :1] if others > self.num_registers else None, state[:, others:])

    def run(self, pixel_values: torch.Tensor) -> ModelOutput:
        """Runs the model on `pixel_values` `(batch, 3, size, size)`."""
        inputs = self.layout.pack(list(pixel_values))
        if self.interpolate:
            inputs["interpolate_pos_encoding"] = True
        return self.model(**inputs, output_hidden_states=True, return_dict=True)

    def read(self, outputs: ModelOutput, pixel_values: torch.Tensor) -> EncoderOutput:
        """Reads what [`HFEncoder.run`] returned."""
        batch, _, size, _ = pixel_values.shape
        tokens = self._split(outputs.last_hidden_state, batch)
        layers = tuple(self._split(state, batch) for state in getattr(outputs, "hidden_states", None) or ())
        if not layers or any(layer.patches.shape != tokens.patches.shape for layer in layers):
            layers = (tokens,)
        class_token, patches = tokens
        pooled = getattr(outputs, "pooler_output", None)
        if pooled is None or pooled.numel() != patches[:, 0].numel():
            pooled = patches.mean(dim=1, keepdim=True) if class_token is None else class_token
        side = math.isqrt(patches.shape[1])
        maps = {f"stride{size // side}": to_map(patches, side, side)}
        return EncoderOutput(tokens, layers, pooled.reshape(batch, -1), maps)

    def forward(self, pixel_values: torch.Tensor) -> EncoderOutput:
        """Maps `pixel_values` `(batch, 3, size, size)` to tokens."""
        return self.read(self.run(pixel_values), pixel_values)


@torch.no_grad()
def measure(encoder: PreTrainedConfig, image_size: int) -> dict[str, int]:
    """
    Measures what an encoder gives for square pictures of `image_size` pixels, on a copy with new weights and, of equal
    layers, one.

    Returns:
        `dict[str, int]`: `encoder_dim`, `patch_size` (the stride of its grid in pixels) and `num_hidden_layers`.

    Raises:
        `ValueError`: If it does not run on such pictures alone, or what it returns is neither a map nor tokens of a
        grid, row by row, that depend on their own part of the picture most.
    """
    name = f"a model of type '{encoder.model_type}' as encoder of pictures of {image_size} pixels"
    advice = "Give another `image_size`, or an encoder that returns a grid of tokens for a picture"
    small = copy.deepcopy(encoder)
    removed = 0
    if "num_hidden_layers" in vars(small):  # not derived from a list of stages
        removed = small.num_hidden_layers - 1
        small.num_hidden_layers = 1
    try:
        with torch.device("cpu"), cpu_seed(0):
            model = HFEncoder(small, image_size, MODEL_MAPPING[type(small)](small)).eval()
            pictures = torch.randn(1, 3, image_size, image_size).repeat(3, 1, 1, 1)
            encoded = model(pictures)
            side = math.isqrt(encoded.tokens.patches.shape[1])
            stride = image_size // side
            last = slice((side - 1) * stride, side * stride)
            for cell in pictures[1, :, :stride, last], pictures[2, :, last, :stride]:
                cell.copy_(torch.randn_like(cell))
            outputs = model.run(pictures)
    except Exception as error:  # whatever a model that needs other inputs stops with
        raise ValueError(
            f"Cannot use {name}: given such pictures alone, it stops with {type(error).__name__}: {error}. {advice}."
        ) from error
    patches = model.read(outputs, pictures).tokens.patches
    changed = (patches[1:] - patches[0]).norm(dim=2).argmax(dim=1).tolist()
    in_order = outputs.last_hidden_state.ndim == 4 or changed == [side - 1, side * (side - 1)]
    if side < 2 or image_size // stride != side or not in_order:
        raise ValueError(
            f"Cannot use {name}: it returned {type(outputs).__name__} with a `last_hidden_state` of shape "
            f"{tuple(outputs.last_hidden_state.shape)} for 3 pictures, but expected was a map, or a token for each "
            f"patch row by row that depends on its patch most. {advice}."
        )
    return {
        "encoder_dim": patches.shape[2],
        "patch_size": stride,
        "num_hidden_layers": len(encoded.layers) - 1 + removed if len(encoded.layers) > 1 else 0,
    }
