"""The encoders of open_clip behind the contract of [`EncoderOutput`], and the choice of an encoder."""

import timm
import torch
from open_clip import CLIPVisionCfg
from open_clip.model import _build_vision_tower
from torch import nn

from .configuration import DeemVisionConfig
from .encoder_output import Encoder, EncoderOutput, Tokens, to_map
from .hf_encoder import HFEncoder


class OpenClipConvNeXt(Encoder):
    """
    ConvNeXt of open_clip (a timm trunk) with linear adapters to one width, as in DEEM: by `open_clip_config`,
    `embed_dim`, `token_stage` and `multiscale` of a config.
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


class OpenClipViT(Encoder):
    """
    Vision transformer of open_clip, by `open_clip_config` of a config. Layers are counted as in Hugging Face's CLIP:
    the tokens are those before the final norm.
    """

    def __init__(self, config: DeemVisionConfig):
        super().__init__()
        cfg = dict(config.open_clip_config)
        if cfg.get("patch_dropout"):
            raise ValueError(
                f"The open_clip model sets `patch_dropout={cfg['patch_dropout']}`, but the tower's tokens form a "
                f"whole grid. Choose a model without it."
            )
        quick_gelu = cfg.pop("quick_gelu", False)
        self.trunk = _build_vision_tower(cfg.get("width", CLIPVisionCfg.width), cfg, quick_gelu)
        self.trunk.proj = None
        self.patch_size = config.patch_size
        self.gradient_checkpointing = False

    def forward(self, pixel_values: torch.Tensor) -> EncoderOutput:
        """Maps `pixel_values` `(batch, 3, size, size)` to tokens."""
        trunk = self.trunk
        embeddings = trunk._embeds(pixel_values)
        last, states = trunk.transformer.forward_intermediates(embeddings)
        layers = tuple(Tokens(state[:, :1], state[:, 1:]) for state in (embeddings, *states))
        height, width = (side // self.patch_size for side in pixel_values.shape[-2:])
        return EncoderOutput(
            tokens=layers[-1],
            layers=layers,
            pooled=trunk._pool(last)[0],
            maps={f"stride{self.patch_size}": to_map(layers[-1].patches, height, width)},
        )


def build_encoder(config: DeemVisionConfig) -> nn.Module:
    """Builds the encoder that `config` describes, with new weights."""
    if config.encoder_config is not None:
        return HFEncoder(config.encoder_config, config.image_size)
    return OpenClipConvNeXt(config) if config.is_convnext else OpenClipViT(config)
