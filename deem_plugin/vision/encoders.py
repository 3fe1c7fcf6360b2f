"""Encoders behind one contract: `pixel_values (batch, 3, height, width)` in, [`EncoderOutput`] out."""

from dataclasses import dataclass, fields
from typing import NamedTuple

import timm
import torch
from open_clip import CLIPVisionCfg
from open_clip.transformer import LayerNorm, QuickGELU, VisionTransformer
from torch import nn
from transformers import AutoModel

from .configuration import DeemVisionConfig


class Tokens(NamedTuple):
    """Class token `(batch, 1, dim)`, `None` where the encoder has none, and patches `(batch, patches, dim)`."""

    class_token: torch.Tensor | None
    patches: torch.Tensor


@dataclass
class EncoderOutput:
    """
    What every encoder returns.

    Args:
        tokens (`Tokens`): The encoder's final tokens, patches in row-major order.
        layers (`tuple[Tokens, ...]`): Tokens after the embedding and after each layer; a single entry for ConvNeXts.
        pooled (`torch.Tensor`): One vector an image, `(batch, dim)`.
        maps (`dict[str, torch.Tensor]`): Feature maps `(batch, dim, height, width)` under the names `stride{pixels}`.
    """

    tokens: Tokens
    layers: tuple[Tokens, ...]
    pooled: torch.Tensor
    maps: dict[str, torch.Tensor]


def to_map(patches: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Lays patches `(batch, height * width, dim)` out as `(batch, dim, height, width)`."""
    return patches.transpose(1, 2).unflatten(2, (height, width))


class OpenClipEncoder(nn.Module):
    """
    What the encoders from open_clip share: loading its weights, and gradient checkpointing that takes effect.

    transformers switches checkpointing on by setting the attribute `gradient_checkpointing` on the modules that have
    it. timm and open_clip do not, so without the property below nothing would be checkpointed and nobody told.
    """

    trunk: nn.Module

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass; setting it reaches the trunk."""
        return self._gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool):
        self._gradient_checkpointing = enable
        self.trunk.set_grad_checkpointing(enable)

    def load_visual(self, visual: nn.Module):
        """
        Copies the weights of the image tower of an open_clip model.

        The projection to the contrastive space is left behind, it has no use here. Anything else that is missing or
        does not fit raises a `RuntimeError`.
        """
        weights = {
            name.removeprefix("trunk."): value
            for name, value in visual.state_dict().items()
            if name != "proj" and not name.startswith("head.")
        }
        self.trunk.load_state_dict(weights, strict=True)


class OpenClipConvNeXt(OpenClipEncoder):
    """
    ConvNeXt of open_clip (a timm trunk) with linear adapters to one width, as in DEEM.

    Args:
        config (`DeemVisionConfig`): Reads `open_clip_config`, `embed_dim`, `token_stage` and `multiscale`.
    """

    def __init__(self, config: DeemVisionConfig):
        super().__init__()
        cfg = config.open_clip_config
        self.trunk = timm.create_model(
            cfg["timm_model_name"],
            num_classes=0,
            drop_path_rate=cfg.get("timm_drop_path") or 0.0,
            **cfg.get("timm_kwargs", {}),
        )
        self.token_stage = config.token_stage
        info = self.trunk.feature_info
        stages = range(len(info)) if config.multiscale else [config.token_stage]
        self.adapters = nn.ModuleDict({str(i): nn.Linear(info[i]["num_chs"], config.embed_dim) for i in stages})
        self.class_adapter = nn.Linear(self.trunk.num_features, config.embed_dim)
        self.strides = [stage["reduction"] for stage in info]
        self.gradient_checkpointing = False

    def forward(self, pixel_values: torch.Tensor) -> EncoderOutput:
        """Maps `pixel_values` `(batch, 3, height, width)`, sides a multiple of the total stride, to tokens."""
        maps = {}
        features = self.trunk.stem(pixel_values)
        for index, stage in enumerate(self.trunk.stages):
            features = stage(features)
            if str(index) in self.adapters:
                adapted = self.adapters[str(index)](features.flatten(2).transpose(1, 2))
                maps[f"stride{self.strides[index]}"] = to_map(adapted, *features.shape[-2:])
                if index == self.token_stage:
                    patches = adapted
        pooled = self.class_adapter(self.trunk.forward_head(self.trunk.norm_pre(features)))
        tokens = Tokens(pooled[:, None], patches)
        return EncoderOutput(tokens, (tokens,), pooled, maps)


# Options of open_clip's vision transformer that `OpenClipViT` follows, or that do not concern it.
_HONOURED = ("image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio", "ls_init_value", "no_ln_pre")
_INDIFFERENT = ("output_tokens",)


def _check_honoured(cfg: CLIPVisionCfg):
    """Raises a `ValueError` if an option is set that would silently change nothing."""
    for option in fields(CLIPVisionCfg):
        ours = option.name in (*_HONOURED, *_INDIFFERENT) or option.name.startswith("timm_")
        if not ours and getattr(cfg, option.name) != option.default:
            raise ValueError(
                f"The open_clip model sets `{option.name}={getattr(cfg, option.name)!r}`, which the tower does not "
                f"support: its tokens would be others than open_clip's. Supported are "
                f"{', '.join(_HONOURED)}; choose a model with the default of `{option.name}` ({option.default!r})."
            )


class OpenClipViT(OpenClipEncoder):
    """
    Vision transformer of open_clip.

    Layers are counted as in Hugging Face's CLIP: the tokens are those before the final norm.

    Args:
        config (`DeemVisionConfig`): Reads `open_clip_config`.
    """

    def __init__(self, config: DeemVisionConfig):
        super().__init__()
        cfg = dict(config.open_clip_config)
        act_layer = QuickGELU if cfg.pop("quick_gelu", False) else nn.GELU
        cfg = CLIPVisionCfg(**cfg)
        _check_honoured(cfg)
        self.trunk = VisionTransformer(
            image_size=cfg.image_size,
            patch_size=cfg.patch_size,
            width=cfg.width,
            layers=cfg.layers,
            heads=cfg.width // cfg.head_width,
            mlp_ratio=cfg.mlp_ratio,
            ls_init_value=cfg.ls_init_value,
            no_ln_pre=cfg.no_ln_pre,
            act_layer=act_layer,
            norm_layer=LayerNorm,
        )
        self.trunk.proj = None
        self.patch_size = cfg.patch_size
        self.gradient_checkpointing = False

    def forward(self, pixel_values: torch.Tensor) -> EncoderOutput:
        """Maps `pixel_values` `(batch, 3, size, size)` to tokens."""
        trunk = self.trunk
        patches = trunk.conv1(pixel_values).flatten(2).transpose(1, 2)
        class_token = trunk.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        embeddings = torch.cat([class_token, patches], dim=1) + trunk.positional_embedding.to(patches.dtype)
        embeddings = trunk.ln_pre(embeddings)

        last, states = trunk.transformer.forward_intermediates(embeddings)
        layers = tuple(Tokens(state[:, :1], state[:, 1:]) for state in (embeddings, *states))
        height, width = (side // self.patch_size for side in pixel_values.shape[-2:])
        return EncoderOutput(
            tokens=layers[-1],
            layers=layers,
            pooled=trunk.ln_post(last[:, 0]),
            maps={f"stride{self.patch_size}": to_map(layers[-1].patches, height, width)},
        )


class HFEncoder(nn.Module):
    """
    CLIP, SigLIP, SigLIP2 or DINOv2 vision model of Hugging Face.

    Register tokens are left out of the output.

    Args:
        config (`DeemVisionConfig`): Reads `encoder_config` and `image_size`.
    """

    def __init__(self, config: DeemVisionConfig):
        super().__init__()
        encoder = config.encoder_config
        self.model = AutoModel.from_config(encoder)
        self.patch_size = config.patch_size
        self.has_class_token = not encoder.model_type.startswith("siglip")
        self.num_prefix_tokens = int(self.has_class_token) + getattr(encoder, "num_register_tokens", 0)
        self.packs_patches = encoder.model_type == "siglip2_vision_model"
        # DINOv2 interpolates unasked, and SigLIP2 by its `spatial_shapes`.
        asks_to_interpolate = encoder.model_type in ("clip_vision_model", "siglip_vision_model")
        self.interpolate = asks_to_interpolate and config.image_size != encoder.image_size

    def _inputs(self, pixel_values: torch.Tensor, height: int, width: int) -> dict:
        if not self.packs_patches:
            inputs = {"pixel_values": pixel_values}
            if self.interpolate:
                inputs["interpolate_pos_encoding"] = True
            return inputs
        batch, size = len(pixel_values), self.patch_size
        patches = pixel_values[..., : height * size, : width * size]
        patches = patches.unflatten(3, (width, size)).unflatten(2, (height, size))  # (batch, 3, h, size, w, size)
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # channels last within a patch
        return {
            "pixel_values": patches,
            "pixel_attention_mask": pixel_values.new_ones(batch, height * width, dtype=torch.long),
            "spatial_shapes": torch.tensor([[height, width]] * batch, device=pixel_values.device),
        }

    def _split(self, state: torch.Tensor) -> Tokens:
        class_token = state[:, :1] if self.has_class_token else None
        return Tokens(class_token, state[:, self.num_prefix_tokens :])

    def forward(self, pixel_values: torch.Tensor) -> EncoderOutput:
        """Maps `pixel_values` `(batch, 3, size, size)` to tokens."""
        height, width = (side // self.patch_size for side in pixel_values.shape[-2:])
        outputs = self.model(**self._inputs(pixel_values, height, width), output_hidden_states=True, return_dict=True)
        tokens = self._split(outputs.last_hidden_state)
        pooled = outputs.pooler_output
        return EncoderOutput(
            tokens=tokens,
            layers=tuple(self._split(state) for state in outputs.hidden_states),
            pooled=tokens.patches.mean(dim=1) if pooled is None else pooled,
            maps={f"stride{self.patch_size}": to_map(tokens.patches, height, width)},
        )


def build_encoder(config: DeemVisionConfig) -> nn.Module:
    """Builds the encoder that `config` describes, with new weights."""
    if config.encoder_config is not None:
        return HFEncoder(config)
    return OpenClipConvNeXt(config) if config.is_convnext else OpenClipViT(config)
