"""Settings of the diffusion feedback, as a recipe or a script writes them: a few small dataclasses."""

import math
from dataclasses import dataclass, field

from .quantization import QUANTIZATIONS
from .timesteps import LOSS_WEIGHTINGS, TIMESTEP_SAMPLERS

CONDITIONS = ("queries", "queries+dense", "patches", "cls", "cls+patches")
OBJECTIVES = ("mse", "contrastive")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class DiffusionModelConfig:
    """
    Which frozen diffusion model gives the feedback, and how it is held. What each saving costs in accuracy is in
    docs/feedback.md.

    Args:
        path (`str`): Folder or hub id in diffusers' layout (`model_index.json`, `unet` or `transformer`, `scheduler`,
            `vae`), or `deem-tiny`, the toy that ships with the package. Without a `vae` it works on pixels.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Precision in which the frozen denoiser is held: `float32`, `bfloat16` or `float16`.
        autoencoder (`str`, *optional*): Folder or hub id of an `AutoencoderTiny` of the same family, which encodes
            pictures in place of the `vae`, with a fraction of its operations: for pictures that no cache can hold.
        image_size (`int`, *optional*):
            Side in pixels of the pictures that are restored; by default that of those it was trained on.
        quantization (`str`, *optional*): Holds the weights of the denoiser's linear layers in fewer bits:
            `torchao_int8`, `bnb_8bit`, `bnb_4bit` (NF4).
        gradient_checkpointing (`bool`, *optional*, defaults to `False`):
            Computes the denoiser's activations anew in its backward pass. The gradient stays as it is.
        cpu_offload (`bool`, *optional*, defaults to `False`):
            Keeps denoiser and autoencoder on the CPU and copies them to the device for each feedback, so that they
            take no memory while the language model runs. Not with `quantization`.
        channels_last (`bool`, *optional*, defaults to `False`):
            Lays the weights of convolutions out channel by channel, as the tensor cores of a GPU read them.
        compile (`bool`, *optional*, defaults to `False`):
            Compiles the denoiser alone by `torch.compile`: minutes once, for a shorter step.
        latent_cache (`str`, *optional*):
            Folder that `deem cache-latents` has filled. Pictures are then looked up there and never encoded.
    """

    path: str | None = None
    dtype: str = "float32"
    autoencoder: str | None = None
    image_size: int | None = None
    quantization: str | None = None
    gradient_checkpointing: bool = False
    cpu_offload: bool = False
    channels_last: bool = False
    compile: bool = False
    latent_cache: str | None = None

    def __post_init__(self):
        _check_choice("dtype", self.dtype, DTYPES)
        _check_at_least_1("image_size", self.image_size)
        if self.quantization is None:
            return
        _check_choice("quantization", self.quantization, tuple(QUANTIZATIONS))
        if self.cpu_offload:
            raise ValueError(
                f"`quantization: {self.quantization}` keeps its weights on the device, and `cpu_offload` does not. "
                f"Set one of the two."
            )


@dataclass
class ConditionConfig:
    """
    What of a picture's visual tokens the denoiser is shown, and through which conditioner.

    Args:
        kind (`str`, *optional*, defaults to `"queries"`):
            `queries` (the tokens that the language model reads, resampled), `queries+dense` (and, inside its UNet, the
            maps of the very picture, which give the answer away: DEEM's official code), `patches` (each of them),
            `cls` (the tower's pooled vector alone), `cls+patches`. See `deem_plugin.feedback.conditions`.
        num_patches (`int`, *optional*): Of `cls+patches`: patches drawn at random for each picture; by default all.
        prompt (`str`, *optional*):
            A fixed text, to whose states from the diffusion model's own text encoder the visual tokens are added.
        num_queries (`int`, *optional*, defaults to `77`): Of `queries`: context tokens that the conditioner makes of
            the visual tokens. A tower that resamples already (the DEEM preset) gives its own queries and ignores this.
        resampler_dim, resampler_layers, resampler_heads (`int`, *optional*, defaults to 768, 2 and 12):
            Width, layers and attention heads of the conditioner's resampler.
    """

    kind: str = "queries"
    num_patches: int | None = None
    prompt: str | None = None
    num_queries: int = 77
    resampler_dim: int = 768
    resampler_layers: int = 2
    resampler_heads: int = 12

    def __post_init__(self):
        _check_choice("condition.kind", self.kind, CONDITIONS)
        for name in ("num_patches", "num_queries", "resampler_dim", "resampler_layers", "resampler_heads"):
            _check_at_least_1(name, getattr(self, name))
        _check_owner("num_patches", self.num_patches, "condition.kind", self.kind, "cls+patches")
        _check_heads("resampler_dim", self.resampler_dim, "resampler_heads", self.resampler_heads)

    @property
    def reads_pooled(self) -> bool:
        """Whether the denoiser is shown the tower's pooled vector."""
        return self.kind in ("cls", "cls+patches")

    @property
    def shows_maps(self) -> bool:
        """Whether the denoiser sees the tower's maps while it runs."""
        return self.kind == "queries+dense"


@dataclass
class ObjectiveConfig:
    """
    Which error of the denoiser is the loss.

    Args:
        kind (`str`, *optional*, defaults to `"mse"`):
            `mse`, the denoising error, or `contrastive`, DCR's loss against the conditions of other pictures.
        timestep_sampling (`str`, *optional*, defaults to `"shrink"`):
            One of `shrink`, `uniform`, `logit_normal` (see `deem_plugin.feedback.timesteps`).
        loss_weighting (`str`, *optional*, defaults to `"uniform"`): How much the error counts at each timestep:
            `uniform` or `min_snr` (DDPM alone), see `deem_plugin.feedback.timesteps`.
        draws_per_image (`int`, *optional*, defaults to `1`):
            Noises and timesteps drawn for each picture, whose errors are averaged.
        num_negatives (`int`, *optional*):
            Of `contrastive`: other pictures that each one is held against; by default all of the micro-batch.
    """

    kind: str = "mse"
    timestep_sampling: str = "shrink"
    loss_weighting: str = "uniform"
    draws_per_image: int = 1
    num_negatives: int | None = None

    def __post_init__(self):
        _check_choice("objective.kind", self.kind, OBJECTIVES)
        _check_choice("timestep_sampling", self.timestep_sampling, TIMESTEP_SAMPLERS)
        _check_choice("loss_weighting", self.loss_weighting, LOSS_WEIGHTINGS)
        for name in ("draws_per_image", "num_negatives"):
            _check_at_least_1(name, getattr(self, name))
        _check_owner("num_negatives", self.num_negatives, "objective.kind", self.kind, "contrastive")
        if self.kind == "contrastive" and (self.draws_per_image > 1 or self.loss_weighting != "uniform"):
            raise ValueError(
                f"`objective.kind: contrastive` draws once an image and weighs all timesteps alike, got "
                f"`draws_per_image: {self.draws_per_image}` and `loss_weighting: {self.loss_weighting}`. Leave them "
                f"out, or set `objective.kind: mse`."
            )


@dataclass(kw_only=True)
class FeedbackSettings:
    """
    What both kinds of feedback say of when and how strongly.

    Args:
        weight (`float`, *optional*, defaults to `5.0`):
            Factor on the feedback loss (lambda of the paper). `0` computes nothing.
        in_eval (`bool`, *optional*, defaults to `False`):
            Whether evaluation computes and logs `eval_feedback_loss` too.
        image_mean, image_std (`list[float]`, *optional*):
            The normalisation of `pixel_values`. By default the processor's own.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the initial weights of what trains along and of the noise; no global generator is touched.
    """

    weight: float = 5.0
    in_eval: bool = False
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    seed: int = 0

    def __post_init__(self):
        _check_factor("weight", self.weight)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"`seed` must be from 0 to 2**32 - 1, got {self.seed}.")
        if (self.image_mean is None) != (self.image_std is None):
            raise ValueError("Give both `image_mean` and `image_std`, or neither (then the processor's are used).")


@dataclass
class FeedbackConfig(FeedbackSettings):
    """
    Settings of the diffusion feedback (DEEM, https://arxiv.org/abs/2405.15232, Eq. 5): which diffusion model restores
    pictures, from what, by which loss; and, here, when and how strongly.

    The defaults are those of the paper and of its code: weight 5 (Table 11), timesteps in [200, 799] (the code's
    `(t - 500) * 0.6 + 500`, which the paper does not mention), 77 queries.

    Args:
        diffusion_model (`DiffusionModelConfig`): The frozen diffusion model.
        condition (`ConditionConfig`, *optional*): What it is shown.
        objective (`ObjectiveConfig`, *optional*): Which of its errors is the loss.
        max_views_per_image (`int`, *optional*):
            Tiles or frames of an image that are restored in a step, drawn at random; its thumbnail is always kept, and
            the loss is the mean over all of them in expectation. By default all are.
        share (`float`, *optional*, defaults to `1.0`): Share of a step's images, in (0, 1], that are encoded and
            restored, drawn at random; each counts 1 / `share` times, so that the expected gradient is that of all.
        balance (`float`, *optional*): Moves `weight`, where it starts, so that the norm of the feedback's gradient at
            the tower's tokens is `balance` times that of the text's. By default the weight stays as it is.
        anchor_weight (`float`, *optional*, defaults to `0.0`): Factor on the distance to the tower as it was when the
            run began, relative to the feedback loss (both are multiplied by `weight`). Holds a copy of the tower.
        conditioner_only (`bool`, *optional*, defaults to `False`):
            Freezes the tower and trains the conditioner alone: the first of GenHancer's and DCR's two stages.
        conditioner (`str`, *optional*):
            Folder with the `feedback.safetensors` to start from; by default that of the model, if it has one.
        weight, in_eval, image_mean, image_std, seed: As in [`FeedbackSettings`].

    Example:

        FeedbackConfig(diffusion_model=DiffusionModelConfig("path/or/hub-id", dtype="bfloat16"), weight=5.0)
    """

    diffusion_model: DiffusionModelConfig = field(default_factory=DiffusionModelConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    max_views_per_image: int | None = None
    share: float = 1.0
    balance: float | None = None
    anchor_weight: float = 0.0
    conditioner_only: bool = False
    conditioner: str | None = None

    def __post_init__(self):
        super().__post_init__()
        _check_class("diffusion_model", self.diffusion_model, DiffusionModelConfig)
        _check_class("condition", self.condition, ConditionConfig)
        _check_class("objective", self.objective, ObjectiveConfig)
        _check_factor("anchor_weight", self.anchor_weight)
        _check_at_least_1("max_views_per_image", self.max_views_per_image)
        if not 0 < self.share <= 1:
            raise ValueError(f"`share` must be above 0 and at most 1 (all images), got {self.share}.")
        if self.share < 1 and self.objective.kind == "contrastive":
            raise ValueError(
                "`objective.kind: contrastive` compares the images of a micro-batch, and `share` draws some of them. "
                "Leave `share` out, or set `objective.kind: mse`."
            )
        if self.balance is not None:
            self._check_balance()
        if self.conditioner_only and self.anchor_weight:
            raise ValueError("A frozen tower cannot drift: leave `anchor_weight` out where `conditioner_only` is set.")
        if self.condition.shows_maps:
            self._check_maps()

    def _check_balance(self):
        """Raises unless text and feedback meet at the tokens that the language model reads."""
        if not (0 < self.balance < math.inf and self.weight > 0):
            raise ValueError(
                f"`balance` is the wanted ratio of two norms and starts at `weight`: both must be above 0 and finite, "
                f"got {self.balance} and {self.weight}."
            )
        if self.conditioner_only or self.condition.reads_pooled or self.condition.shows_maps:
            raise ValueError(
                f"`balance` compares gradients at the tokens that the language model reads, and with `condition.kind: "
                f"{self.condition.kind}`, `conditioner_only: {self.conditioner_only}` the feedback's passes them by. "
                f"Leave `balance` out, or set `condition.kind` to queries or patches and train the tower."
            )

    def _check_maps(self):
        """Raises on what does not go with a denoiser that sees the tower's maps while it runs."""
        objective, model = self.objective, self.diffusion_model
        others = {
            "objective.kind": objective.kind != "mse",
            "objective.draws_per_image": objective.draws_per_image > 1,
            "share": self.share < 1,
        }
        others |= {name: getattr(model, name) for name in ("gradient_checkpointing", "cpu_offload", "compile")}
        if given := [name for name, is_given in others.items() if is_given]:
            raise ValueError(
                f"`condition.kind: queries+dense` shows the maps of a picture in one run of the UNet, within which a "
                f"synchroniser trains: {given} would repeat, move, compile or skip it without that. Leave them out or "
                f"set `condition.kind: queries`."
            )

    def check_loadable(self):
        """Raises a `ValueError` if there is no diffusion model to load."""
        if self.diffusion_model.path is None:
            raise ValueError(
                "The feedback needs a diffusion model: set `diffusion_model.path` to a folder or hub id in diffusers' "
                "layout, for example `FeedbackConfig(diffusion_model=DiffusionModelConfig('path/or/hub-id'))`."
            )


def _ross_objective() -> ObjectiveConfig:
    return ObjectiveConfig(timestep_sampling="uniform", draws_per_image=4)


@dataclass
class RossConfig(FeedbackSettings):
    """
    Settings of feedback at the language model's own outputs for a picture's tokens (ROSS,
    https://arxiv.org/abs/2410.09575), from which a small denoiser that trains along restores the picture's latents.

    The defaults are ROSS's own.

    Args:
        autoencoder (`str`): Folder or hub id of a diffusion model, whose autoencoder alone is read.
        token_cells (`int`, *optional*, defaults to `2`): Side of the block of latent cells that each token restores.
        width, layers, heads (`int`, *optional*, defaults to 1024, 3 and 16): Shape of the small denoiser.
        objective (`ObjectiveConfig`, *optional*): Timesteps, draws and weights of its error; `mse` only.
        weight (`float`, *optional*, defaults to `1.0`), in_eval, image_mean, image_std, seed:
            As in [`FeedbackSettings`].
    """

    autoencoder: str | None = None
    token_cells: int = 2
    width: int = 1024
    layers: int = 3
    heads: int = 16
    objective: ObjectiveConfig = field(default_factory=_ross_objective)
    weight: float = field(default=1.0, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        _check_class("objective", self.objective, ObjectiveConfig)
        for name in ("token_cells", "width", "layers", "heads"):
            _check_at_least_1(name, getattr(self, name))
        _check_heads("width", self.width, "heads", self.heads)
        _check_choice("objective.kind", self.objective.kind, ("mse",))

    def check_loadable(self):
        """Raises a `ValueError` if there is no autoencoder to load."""
        if self.autoencoder is None:
            raise ValueError(
                "ROSS's feedback needs an autoencoder: set `autoencoder` to a folder or hub id of a diffusion model "
                "in diffusers' layout, for example `RossConfig(autoencoder='path/or/hub-id')`."
            )


def _check_factor(name, value):
    if not 0 <= value < math.inf:
        raise ValueError(f"`{name}` must be a finite number, zero or positive, got {value}.")


def _check_at_least_1(name, value):
    if value is not None and value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")


def _check_class(name, value, cls):
    if not isinstance(value, cls):
        raise ValueError(f"`{name}` must be a {cls.__name__}, got {value!r}: write `{name}={cls.__name__}(...)`.")


def _check_heads(width_name, width, heads_name, heads):
    if width % heads:
        raise ValueError(f"`{width_name}` ({width}) must be a multiple of `{heads_name}` ({heads}).")


def _check_owner(name, given, owner, value, expected):
    """Raises if a setting is given that belongs to another choice."""
    if given and value != expected:
        raise ValueError(
            f"`{name}` belongs to `{owner}: {expected}`, and `{owner}` is {value!r}. Leave `{name}` out or set "
            f"`{owner}: {expected}`."
        )
