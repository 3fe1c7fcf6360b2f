"""DeemVisionConfig: everything that defines a vision tower and is saved with it."""

from dataclasses import fields

from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, CLIPVisionCfg
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .hf_encoder import measure, own_image_size

# The image tower of open_clip's `convnext_base_w_320`, the encoder of the paper.
CONVNEXT_BASE_W_320 = {
    "timm_model_name": "convnext_base",
    "timm_drop_path": 0.1,
    "image_size": 320,
}

_OPEN_CLIP_KEYS = {field.name for field in fields(CLIPVisionCfg)} | {"quick_gelu", "timm_kwargs"}
_CONVNEXT_STAGES = 4


class DeemVisionConfig(PreTrainedConfig):
    """
    Configuration of a [`DeemVisionTower`]: one encoder, and what follows it.

    The encoder is either a Hugging Face vision model (`encoder_config`) or a model of open_clip
    (`open_clip_config`); with neither it is the ConvNeXt of the paper. The fields of the last group are derived from
    the encoder, because the models that hold the tower read them here; they need not be given.

    Args:
        encoder_config (`dict` or `PreTrainedConfig`, *optional*): Configuration of a vision encoder of transformers
            that returns tokens or a map, see [`~deem_plugin.vision.hf_encoder.HFEncoder`].
        open_clip_config (`dict`, *optional*):
            The `vision_cfg` of an open_clip model, so that a checkpoint needs no registry to be built again. Two more
            keys are understood: `quick_gelu` (bool) and `timm_kwargs` (dict), which goes to `timm.create_model`.
        embed_dim (`int`, *optional*, defaults to 1024):
            Width that the linear adapters give to the ConvNeXt's features. ViTs have no adapter and keep their width.
        token_stage (`int`, *optional*, defaults to 2):
            ConvNeXt stage (0 to 3) that becomes the token sequence. Stage 2 has stride 16, as in DEEM.
        multiscale (`bool`, *optional*): Whether the other ConvNeXt stages get adapters too and are returned as maps.
        num_queries (`int`, *optional*): Queries of the resampler; 0, the default, means no resampler. DEEM has 77.
        resampler_hidden_size, resampler_num_layers, resampler_num_heads (`int`, *optional*, defaults to 768, 12 and
            12): Width of the queries, layers and attention heads.
        resampler_intermediate_size (`int`, *optional*): Width of the feed-forward; four times the width by default.
        cross_attention_frequency (`int`, *optional*, defaults to 2): Every how many layers the queries read the image.
        resampler_qk_norm (`bool`, *optional*, defaults to `True`): Whether it normalises queries and keys per head.
        region_tokens (`bool`, *optional*, defaults to `False`): Whether the queries also read tokens made of the
            region: of each map, and of its shape (DEEM's third stage). Needs `multiscale` and a resampler.
        image_mean, image_std (`list[float]`, *optional*): Normalisation of `pixel_values`, OpenAI CLIP's by default.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of new linear weights.
        image_size (`int`, *optional*): Side of the square input in pixels. Hugging Face encoders interpolate their
            position embeddings when it differs from their own; for open_clip it is set in `open_clip_config`.
        hidden_size, patch_size, num_hidden_layers, encoder_dim (`int`):
            Derived. `patch_size` is the stride of the token grid in pixels, `encoder_dim` the width of the encoder's
            tokens, from which `hidden_size` differs behind a resampler.
    """

    model_type = "deem_vision"
    base_config_key = "vision_config"
    sub_configs_defaults = {
        "encoder_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model", optional=True)
    }

    encoder_config: dict | PreTrainedConfig | None = None
    open_clip_config: dict | None = None
    embed_dim: int = 1024
    token_stage: int = 2
    multiscale: bool = False
    num_queries: int = 0
    resampler_hidden_size: int = 768
    resampler_num_layers: int = 12
    resampler_num_heads: int = 12
    resampler_intermediate_size: int | None = None
    cross_attention_frequency: int = 2
    resampler_qk_norm: bool = True
    region_tokens: bool = False
    image_mean: list[float] | tuple[float, ...] = OPENAI_DATASET_MEAN
    image_std: list[float] | tuple[float, ...] = OPENAI_DATASET_STD
    initializer_range: float = 0.02

    image_size: int | None = None
    hidden_size: int | None = None
    patch_size: int | None = None
    num_hidden_layers: int | None = None
    encoder_dim: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.encoder_config is None and self.open_clip_config is None:
            self.open_clip_config = dict(CONVNEXT_BASE_W_320)
        if self.encoder_config is not None and self.open_clip_config is not None:
            raise ValueError(
                "A tower has one encoder, got both `encoder_config` and `open_clip_config`. Leave one of them out."
            )
        if self.region_tokens and not (self.multiscale and self.num_queries):
            raise ValueError(
                f"`region_tokens` are made of the encoder's maps for the queries to read; set `multiscale=True` and "
                f"`num_queries` above 0 (now {self.multiscale} and {self.num_queries})."
            )
        derived = self._describe_hf_encoder() if self.encoder_config is not None else self._describe_open_clip()
        derived["hidden_size"] = self.resampler_hidden_size if self.num_queries else derived["encoder_dim"]
        for name, value in derived.items():
            given = getattr(self, name)
            if given is not None and given != value:
                raise ValueError(
                    f"`{name}` follows from the encoder and is {value}, got {given}. Leave `{name}` out, or change "
                    f"the encoder's own configuration."
                )
            setattr(self, name, value)

    def _describe_hf_encoder(self) -> dict:
        self.image_size = self.image_size or own_image_size(self.encoder_config)
        if self.image_size is None:
            raise ValueError(
                f"A model of type '{self.encoder_config.model_type}' does not say for which square pictures it was "
                f"made. Give `image_size`, a number of pixels."
            )
        if None not in (self.encoder_dim, self.patch_size, self.num_hidden_layers):  # measured when it was saved
            return {"encoder_dim": self.encoder_dim}
        return measure(self.encoder_config, self.image_size)

    def _describe_open_clip(self) -> dict:
        cfg = self.open_clip_config
        if unknown := sorted(set(cfg) - _OPEN_CLIP_KEYS):
            raise ValueError(
                f"Unknown keys in `open_clip_config`: {', '.join(unknown)}. "
                f"Known: {', '.join(sorted(_OPEN_CLIP_KEYS))}."
            )
        image_size = cfg.get("image_size", CLIPVisionCfg.image_size)
        if not isinstance(image_size, int):
            raise ValueError(f"The tower reads square images, got `image_size`={image_size}. Give one integer.")
        if self.is_convnext:
            return {"image_size": image_size} | self._describe_convnext(image_size)
        if cfg.get("timm_model_name") or not isinstance(cfg.get("layers", 12), int) or cfg.get("attentional_pool"):
            raise ValueError(
                f"Of open_clip, ConvNeXts and plain vision transformers can be the encoder, got {cfg}. For SigLIP "
                f"models give the id of the Hugging Face checkpoint instead."
            )
        return {
            "image_size": image_size,
            "encoder_dim": cfg.get("width", CLIPVisionCfg.width),
            "patch_size": cfg.get("patch_size", CLIPVisionCfg.patch_size),
            "num_hidden_layers": cfg.get("layers", CLIPVisionCfg.layers),
        }

    def _describe_convnext(self, image_size: int) -> dict:
        if not 0 <= self.token_stage < _CONVNEXT_STAGES:
            raise ValueError(f"`token_stage` must be 0, 1, 2 or 3, got {self.token_stage}.")
        stem_stride = self.open_clip_config.get("timm_kwargs", {}).get("patch_size", 4)
        total_stride = stem_stride * 2 ** (_CONVNEXT_STAGES - 1)
        if image_size % total_stride:
            raise ValueError(
                f"A ConvNeXt needs an image size that is a multiple of its total stride {total_stride}, "
                f"got {image_size}. Choose for example {max(round(image_size / total_stride), 1) * total_stride}."
            )
        return {
            "encoder_dim": self.embed_dim,
            "patch_size": stem_stride * 2**self.token_stage,
            "num_hidden_layers": _CONVNEXT_STAGES,
        }

    @property
    def is_convnext(self) -> bool:
        """Whether the encoder is one of open_clip's ConvNeXts."""
        return self.open_clip_config is not None and str(self.open_clip_config.get("timm_model_name", "")).startswith(
            "convnext"
        )

    @property
    def grid_size(self) -> int:
        """Number of patches along each side."""
        return self.image_size // self.patch_size

    @property
    def num_image_tokens(self) -> int:
        """Length of the output sequence."""
        return self.num_queries or self.grid_size**2
