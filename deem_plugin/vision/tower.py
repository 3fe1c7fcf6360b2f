"""DeemVisionTower: the encoder and, where there is one, the resampler; what a language model sees as its eyes."""

from dataclasses import dataclass

import torch
from open_clip.transformer import LayerScale, VisionTransformer
from timm.models.convnext import ConvNeXtBlock
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from .configuration import DeemVisionConfig
from .encoder_output import EncoderOutput
from .encoders import build_encoder
from .grids import positioned_maps, region_to_patches, sincos_position_embedding
from .region_tokens import RegionTokens
from .resampler import PerceiverResampler


@dataclass
class DeemVisionOutput(BaseModelOutputWithPooling):
    """
    Output of the tower.

    Args:
        last_hidden_state (`torch.Tensor`): Tokens `(batch, tokens, hidden_size)`: patches in rows, or queries.
        pooler_output (`torch.Tensor`): One vector an image, `(batch, hidden_size)`.
        hidden_states (`tuple[torch.Tensor, ...]`, *optional*): The same sequence layer by layer, when asked for.
        maps (`dict[str, torch.Tensor]`, *optional*): The encoder's maps `(batch, encoder_dim, height, width)`, named
            `stride{pixels}`.
    """

    maps: dict[str, torch.Tensor] | None = None


class DeemVisionTower(PreTrainedModel):
    """
    Vision tower of DEEM (https://arxiv.org/abs/2405.15232, Sec. 2.1), for any VLM whose tower can be exchanged.

    Without a resampler it returns the encoder's tokens. With one, patches get a position embedding, are masked by the
    region if there is one, and are read by a fixed number of queries.

    Args:
        config (`DeemVisionConfig`): What to build. The weights are new; [`build_vision_tower`] loads pretrained ones.
    """

    config_class = DeemVisionConfig
    base_model_prefix = "vision_tower"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["ResamplerLayer", "ConvNeXtStage", "ResidualAttentionBlock"]
    # These speak for a nested Hugging Face encoder; the other parts call `scaled_dot_product_attention` in any case.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: DeemVisionConfig):
        super().__init__(config)
        self.encoder = build_encoder(config)
        self.resampler = None
        if config.num_queries:
            width = config.encoder_dim
            self.position_proj = nn.Linear(width, width)
            self.position_norm = nn.LayerNorm(width, eps=1e-6)
            self.input_norm = nn.LayerNorm(width, eps=1e-6)
            self.resampler = PerceiverResampler(
                width,
                hidden_dim=config.resampler_hidden_size,
                num_queries=config.num_queries,
                num_layers=config.resampler_num_layers,
                num_heads=config.resampler_num_heads,
                intermediate_dim=config.resampler_intermediate_size,
                cross_attention_frequency=config.cross_attention_frequency,
                qk_norm=config.resampler_qk_norm,
            )
        self.region_tokens = RegionTokens(config.encoder_dim) if config.region_tokens else None
        self.post_init()

    def _init_weights(self, module):
        # What no rule of the base class covers: parameters that hang directly on a module.
        super()._init_weights(module)
        if isinstance(module, PerceiverResampler):
            init.normal_(module.queries, std=self.config.initializer_range)
        elif isinstance(module, ConvNeXtBlock) and module.gamma is not None:
            init.constant_(
                module.gamma, self.config.open_clip_config.get("timm_kwargs", {}).get("ls_init_value", 1e-6)
            )
        elif isinstance(module, LayerScale):
            init.constant_(module.gamma, self.config.open_clip_config["ls_init_value"])
        elif isinstance(module, VisionTransformer):
            scale = self.config.encoder_dim**-0.5
            init.normal_(module.class_embedding, std=scale)
            if module.positional_embedding.requires_grad:  # else it is sinusoidal
                init.normal_(module.positional_embedding, std=scale)

    def get_input_embeddings(self) -> nn.Module:
        """Returns the module that turns pixels into patches, so that its output can be made to require gradients."""
        return next(module for module in self.encoder.modules() if isinstance(module, nn.Conv2d | nn.Linear))

    @property
    def num_layers(self) -> int:
        """Number of hidden states: one behind a resampler and for ConvNeXts, whose stages differ in resolution."""
        if self.resampler is not None or self.config.is_convnext:
            return 1
        return self.config.num_hidden_layers + 1

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        region_masks: torch.Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        **kwargs,
    ) -> DeemVisionOutput:
        """
        Reads pictures.

        Args:
            pixel_values (`torch.Tensor`): Normalised images `(batch, 3, image_size, image_size)`.
            region_masks (`torch.Tensor`, *optional*): Shape `(batch, 1, height, width)` at any resolution, nonzero in
                the region to look at. Patches outside become zero.
            output_hidden_states (`bool`, `int` or `list[int]`, *optional*): Whether to return `hidden_states`. VLMs
                pass the index, or indices, of the layers that they will read; the others are then `None`, as in
                transformers' own towers.
            kwargs: What VLMs pass to towers in general, such as `output_attentions`; not used.

        Raises:
            `ValueError`: For images of another size, for a layer that the tower does not have, and for empty region
            masks.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        wanted = _layers_asked_for(output_hidden_states, self.num_layers)
        size, grid = self.config.image_size, self.config.grid_size
        if pixel_values.shape[1:] != (3, size, size):
            raise ValueError(
                f"The tower reads images of shape (batch, 3, {size}, {size}), got {tuple(pixel_values.shape)}. Use "
                f"the image processor made by `build_image_processor(tower)`, or build the tower with another "
                f"`image_size`."
            )

        encoded = self.encoder(pixel_values)
        mask = None
        if region_masks is not None:
            mask = region_to_patches(region_masks, grid, grid).to(encoded.tokens.patches.dtype)

        if self.resampler is not None:
            last_hidden_state = self._resample(encoded, mask, region_masks)
            hidden_states, pooled = (last_hidden_state,), last_hidden_state.mean(dim=1)
        else:
            layers = (layer.patches if index in wanted else None for index, layer in enumerate(encoded.layers))
            last_hidden_state, *hidden_states = (
                patches if patches is None or mask is None else patches * mask
                for patches in (encoded.tokens.patches, *layers)
            )
            hidden_states, pooled = tuple(hidden_states), encoded.pooled
        return DeemVisionOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=pooled,
            hidden_states=hidden_states if wanted else None,
            maps=encoded.maps,
        )

    def _resample(self, encoded: EncoderOutput, mask=None, region_masks=None) -> torch.Tensor:
        """Reads the encoder's tokens with the resampler, giving `(batch, num_queries, hidden_size)`."""
        inputs = self.resampler_inputs(encoded, mask)
        if self.region_tokens is not None:
            if region_masks is None:
                region_masks = inputs.new_ones(len(inputs), 1, self.config.grid_size, self.config.grid_size)
            tokens = self.region_tokens(positioned_maps(encoded.maps), region_masks)
            inputs = torch.cat([tokens.to(inputs.dtype), inputs], dim=1)
        return self.resampler(inputs)

    def resampler_inputs(self, encoded: EncoderOutput, mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Prepares the encoder's tokens for the resampler: projection, position embedding, region (`mask` `(batch,
        patches, 1)`), norm. Returns `(batch, tokens, encoder_dim)`, class token first where the encoder has one.
        """
        class_token, patches = encoded.tokens
        side = self.config.grid_size
        positions = sincos_position_embedding(patches.shape[2], side, side, device=patches.device)
        patches = self.position_norm(self.position_proj(patches)) + positions.to(patches.dtype)
        if mask is not None:
            patches = patches * mask
        if class_token is not None:
            patches = torch.cat([self.position_norm(self.position_proj(class_token)), patches], dim=1)
        return self.input_norm(patches)


def _layers_asked_for(output_hidden_states: bool | int | list[int] | None, num_layers: int) -> set[int]:
    """Resolves what `output_hidden_states` may be to layers from 0 on. Layer 0 is a request, though it is falsy."""
    if output_hidden_states is None or isinstance(output_hidden_states, bool):
        return set(range(num_layers)) if output_hidden_states else set()
    layers = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
    for layer in layers:
        if not -num_layers <= layer < num_layers:
            what = "one output, layer -1" if num_layers == 1 else f"layers {-num_layers} to {num_layers - 1}"
            raise ValueError(
                f"This tower has {what}, but layer {layer} was asked for. Set `vision_feature_layer` of the "
                f"vision-language model to one that there is."
            )
    return {layer % num_layers for layer in layers}
