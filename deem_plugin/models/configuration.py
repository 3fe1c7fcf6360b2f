"""DeemConfig: everything that defines the interleaved model and is saved with it."""

import copy

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from ..feedback.timesteps import TIMESTEP_SAMPLERS
from ..vision import DeemVisionConfig


class DeemConfig(PreTrainedConfig):
    """
    Configuration of [`DeemForConditionalGeneration`] (DEEM, https://arxiv.org/abs/2405.15232, Sec. 2.1 and 2.3).

    The new tokens of the model (image start, image slot, and what a tokenizer may add behind them) are rows of its
    own, beside the vocabulary of the language model, which stays as it was published.

    Args:
        text_config (`dict` or `PreTrainedConfig`): Of any causal language model of transformers; a Llama by default.
        vision_config (`dict` or `DeemVisionConfig`): Of the tower. The paper's has 77 queries and no class token.
        num_new_tokens (`int`, *optional*, defaults to 2): Rows of new tokens.
        first_new_token_id (`int`, *optional*):
            Id of the first of them; the vocabulary size of the language model by default. With a tokenizer that has
            fewer tokens than the model has rows, its length; the padding rows behind are then not used.
        image_start_token_id, image_token_id (`int`, *optional*): By default the first and the second new token.
        context_dim (`int`, *optional*, defaults to 1024):
            Width of the denoiser's context: 1024 for Stable Diffusion 2.x. `None` makes a model that only reads.
        image_decoder_layers, image_decoder_heads (`int`, *optional*, defaults to 1 and 16): Resampler that draws.
        image_decoder_intermediate_size (`int`, *optional*): Its feed-forward; four times `context_dim` by default.
        null_context_rate (`float`, *optional*, defaults to 0.1):
            How often a picture is learned without its context, for classifier-free guidance, in [0, 1).
        lm_weight, image_weight, feedback_weight (`float`, *optional*, defaults to 1, 5 and 5):
            Factors on the losses of the next token (NTP), the next image (NIP) and the same image (CSR), Eq. 2 to 6.
            The first two are means over tokens and over images; the feedback is the sum over the images of an
            optimizer step by its documents, as in the callback. A loss of weight 0 is not computed.
        feedback_timesteps (`str`, *optional*, defaults to `"shrink"`):
            One of `TIMESTEP_SAMPLERS`, for the feedback. The next image is learned at uniform timesteps.
        language_synchroniser (`dict`, *optional*):
            Options of a [`LanguageModelSynchroniser`], such as `{"frequency": 4}` of the paper; without them the
            language model looks at no maps. Needs a `multiscale` tower.
        unet_synchroniser (`dict`, *optional*):
            Options of a [`UNetSynchroniser`], by which the next image also sees the maps of the one before it. Under
            `"unet"` the config of the UNet: `sample_size`, `block_out_channels` and `layers_per_block`.
        feedback_maps (`bool`, *optional*, defaults to `False`):
            Whether the feedback sees the maps of the very image, too, as in the official code. They give the answer
            away: the queries then have less to tell.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of new linear weights.
    """

    model_type = "deem"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=DeemVisionConfig,
            model_type="deem_vision",
            init_kwargs={"num_queries": 77},
        ),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    num_new_tokens: int = 2
    first_new_token_id: int | None = None
    image_start_token_id: int | None = None
    image_token_id: int | None = None
    context_dim: int | None = 1024
    image_decoder_layers: int = 1
    image_decoder_heads: int = 16
    image_decoder_intermediate_size: int | None = None
    null_context_rate: float = 0.1
    lm_weight: float = 1.0
    image_weight: float = 5.0
    feedback_weight: float = 5.0
    feedback_timesteps: str = "shrink"
    language_synchroniser: dict | None = None
    unet_synchroniser: dict | None = None
    feedback_maps: bool = False
    initializer_range: float = 0.02

    def get_text_config(self, decoder=None, encoder=None):
        """As everywhere, but a copy whose `vocab_size` is the width of the logits: `generate` takes it for that."""
        config = copy.copy(super().get_text_config(decoder=decoder, encoder=encoder))
        config.vocab_size = self.first_new_token_id + self.num_new_tokens
        return config

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.first_new_token_id is None:
            self.first_new_token_id = self.text_config.vocab_size
        first = self.first_new_token_id
        if first > self.text_config.vocab_size:
            raise ValueError(
                f"`first_new_token_id` is {first}, but the language model has {self.text_config.vocab_size} tokens. "
                f"New tokens follow its own without a gap."
            )
        if self.image_start_token_id is None:
            self.image_start_token_id = first
        if self.image_token_id is None:
            self.image_token_id = first + 1
        for name in ("image_start_token_id", "image_token_id"):
            if not first <= getattr(self, name) < first + self.num_new_tokens:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)}; the new tokens are {first} to "
                    f"{first + self.num_new_tokens - 1}. Raise `num_new_tokens`, or leave `{name}` out."
                )
        if self.feedback_timesteps not in TIMESTEP_SAMPLERS:
            raise ValueError(
                f"`feedback_timesteps` is {self.feedback_timesteps!r}; choose one of {', '.join(TIMESTEP_SAMPLERS)}."
            )
        if not 0 <= self.null_context_rate < 1:
            raise ValueError(f"`null_context_rate` is {self.null_context_rate}; it must be in [0, 1).")
        looks = self.language_synchroniser is not None or self.unet_synchroniser is not None
        if looks and not self.vision_config.multiscale:
            raise ValueError("A synchroniser reads the tower's maps. Set `multiscale=True` in `vision_config`.")
        if self.unet_synchroniser is not None and self.context_dim is None:
            raise ValueError("A UNet's synchroniser is of no use to a model that only reads. Set `context_dim`, too.")
        if self.feedback_maps and self.unet_synchroniser is None:
            raise ValueError("`feedback_maps` is read by the UNet's synchroniser. Set `unet_synchroniser`, too.")
        for name in ("lm_weight", "image_weight", "feedback_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; a weight must be 0 or more.")
