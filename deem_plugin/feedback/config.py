"""Settings of the diffusion feedback, as a recipe or a script writes them."""

import math
from dataclasses import dataclass, field

from .quantization import QUANTIZATIONS

WEIGHT_SCHEDULES = ("constant", "linear")
TIMESTEP_SAMPLINGS = ("shrink", "uniform", "logit_normal", "stratified")
LOSS_WEIGHTINGS = ("uniform", "min_snr", "cosmap")
CONDITIONS = ("queries", "queries+dense", "patches", "cls", "cls+patches")
OBJECTIVES = ("mse", "contrastive")
SOURCES = ("tower", "llm")
DTYPES = ("float32", "bfloat16", "float16")
# Settings that change how the denoiser computes, and neither its weights nor the gradient.
SAVINGS = ("gradient_checkpointing", "cpu_offload", "channels_last", "compile_denoiser")


@dataclass
class FeedbackConfig:
    """
    Settings of the diffusion feedback (DEEM, https://arxiv.org/abs/2405.15232, Eq. 5).

    The defaults are those of the paper and of its code: weight 5 (Table 11), timesteps in [200, 799] (the code's
    `(t - 500) * 0.6 + 500`, which the paper does not mention), 77 queries.

    Args:
        denoiser (`str`):
            Folder or hub id of the frozen generator in diffusers' layout (`model_index.json`, `unet` or
            `transformer`, `scheduler`, `vae`). Without a `vae` it is taken for a pixel-space generator.
        source (`str`, *optional*, defaults to `"tower"`):
            Where the feedback is hung: `tower`, or `llm`: at the language model's own outputs for a picture's tokens
            (ROSS), restored by a small denoiser that is trained along. Of `denoiser` then only the autoencoder is
            read, and `resampler_dim`, `resampler_layers` and `resampler_heads` are the small denoiser's.
        token_cells (`int`, *optional*, defaults to `2`):
            Of `llm`: side of the block of latent cells that each token restores.
        weight (`float`, *optional*, defaults to `5.0`):
            Factor on the feedback loss (lambda of the paper). `0` computes nothing.
        weight_schedule (`str`, *optional*, defaults to `"constant"`):
            `"constant"`, or `"linear"`: from near 0 to `weight` over `warmup_steps` optimizer steps.
        warmup_steps (`int`, *optional*, defaults to `0`):
            Length of the linear ramp, in optimizer steps.
        every (`int`, *optional*, defaults to `1`):
            Computes the feedback at every `every`-th optimizer step only. The weight is not scaled up for it.
        timestep_sampling (`str`, *optional*, defaults to `"shrink"`):
            One of `shrink`, `uniform`, `logit_normal`, `stratified` (see `deem_plugin.feedback.timesteps`).
        loss_weighting (`str`, *optional*, defaults to `"uniform"`):
            How much the error counts at each timestep: `uniform`, `min_snr` (DDPM) or `cosmap` (flow), see
            `deem_plugin.feedback.weighting`.
        max_views_per_image (`int`, *optional*):
            Tiles or frames of an image that are judged in a step, drawn at random; its thumbnail is always kept, and
            the loss is the mean over all of them in expectation. By default all are.
        draws_per_image (`int`, *optional*, defaults to `1`):
            Noises and timesteps drawn for each picture, whose errors are averaged.
        objective (`str`, *optional*, defaults to `"mse"`):
            `mse`, the denoising error, or `contrastive`, DCR's loss against the conditions of other pictures.
        num_negatives (`int`, *optional*):
            Of `contrastive`: other pictures that each one is held against; by default all of the micro-batch.
        condition (`str`, *optional*, defaults to `"queries"`):
            What the generator is shown: `queries` (the tokens that the language model reads, resampled),
            `queries+dense` (and, inside its UNet, the maps of the very picture, which give the answer away: DEEM's
            official code), `patches` (each of them), `cls` (the tower's pooled vector alone), `cls+patches`. See
            `deem_plugin.feedback.conditions`.
        num_patches (`int`, *optional*):
            Of `cls+patches`: patches drawn at random for each picture; by default all.
        prompt (`str`, *optional*):
            A fixed text, to whose states from the generator's own text encoder the visual tokens are added.
        num_queries (`int`, *optional*, defaults to `77`):
            Of `queries`: context tokens that the conditioner makes of the visual tokens. A tower that resamples
            already (the DEEM preset) gives its own queries and ignores this.
        resampler_dim (`int`, *optional*, defaults to `768`):
            Width of the conditioner's resampler.
        resampler_layers (`int`, *optional*, defaults to `2`):
            Layers of the conditioner's resampler.
        resampler_heads (`int`, *optional*, defaults to `12`):
            Attention heads of the conditioner's resampler.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Precision in which the frozen denoiser is held: `float32`, `bfloat16` or `float16`.
        image_size (`int`, *optional*):
            Side in pixels of the pictures that the generator restores; by default that of those it was trained on.
        quantization (`str`, *optional*):
            Holds the weights of the denoiser's linear layers in fewer bits: `torchao_int8`, `bnb_8bit`, `bnb_4bit`
            (NF4). What each costs in accuracy is in docs/feedback.md, as for the four that follow.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`):
            Computes the denoiser's activations anew in its backward pass. The gradient stays as it is.
        cpu_offload (`bool`, *optional*, defaults to `False`):
            Keeps denoiser and autoencoder on the CPU and copies them to the device for each feedback, so that they
            take no memory while the language model runs. Not with `quantization`.
        channels_last (`bool`, *optional*, defaults to `False`):
            Lays the weights of convolutions out channel by channel, as the tensor cores of a GPU read them.
        compile_denoiser (`bool`, *optional*, defaults to `False`):
            Compiles the denoiser alone by `torch.compile`: minutes once, for a shorter step.
        latent_cache (`str`, *optional*):
            Folder that `deem cache-latents` has filled. Pictures are then looked up there and never encoded.
        anchor_weight (`float`, *optional*, defaults to `0.0`):
            Factor on the distance to the tower as it was when the run began, relative to the feedback loss (both are
            multiplied by `weight`). Holds a copy of the tower.
        conditioner_only (`bool`, *optional*, defaults to `False`):
            Freezes the tower and trains the conditioner alone: the first of GenHancer's and DCR's two stages.
        conditioner (`str`, *optional*):
            Folder with the `feedback.safetensors` to start from; by default that of the model, if it has one.
        official_defects (`bool`, *optional*, defaults to `False`):
            Reproduces what the code of the objective's paper does wrong (`contrastive`: see
            `deem_plugin.feedback.contrastive` and `deem_plugin.feedback.second_view`).
        in_eval (`bool`, *optional*, defaults to `False`):
            Whether evaluation computes and logs `eval_feedback_loss` too.
        image_mean (`list[float]`, *optional*), image_std (`list[float]`, *optional*):
            The normalisation of `pixel_values`. By default the processor's own.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the conditioner's initial weights and of the noise; no global generator is touched.
    """

    denoiser: str | None = field(default=None, metadata={"help": "Folder or hub id of the frozen generator."})
    source: str = field(default="tower", metadata={"help": f"One of {', '.join(SOURCES)}."})
    token_cells: int = field(default=2, metadata={"help": "Side of the block of latents that a token restores."})
    weight: float = field(default=5.0, metadata={"help": "Factor on the feedback loss. 0 computes nothing."})
    weight_schedule: str = field(default="constant", metadata={"help": f"One of {', '.join(WEIGHT_SCHEDULES)}."})
    warmup_steps: int = field(default=0, metadata={"help": "Length of the linear ramp, in optimizer steps."})
    every: int = field(default=1, metadata={"help": "Compute the feedback at every k-th optimizer step only."})
    timestep_sampling: str = field(default="shrink", metadata={"help": f"One of {', '.join(TIMESTEP_SAMPLINGS)}."})
    loss_weighting: str = field(default="uniform", metadata={"help": f"One of {', '.join(LOSS_WEIGHTINGS)}."})
    max_views_per_image: int | None = field(default=None, metadata={"help": "Tiles or frames judged of an image."})
    draws_per_image: int = field(default=1, metadata={"help": "Noises and timesteps drawn for each picture."})
    objective: str = field(default="mse", metadata={"help": f"One of {', '.join(OBJECTIVES)}."})
    num_negatives: int | None = field(default=None, metadata={"help": "Other pictures that each is held against."})
    condition: str = field(default="queries", metadata={"help": f"One of {', '.join(CONDITIONS)}."})
    num_patches: int | None = field(default=None, metadata={"help": "Random patches of `cls+patches`."})
    prompt: str | None = field(default=None, metadata={"help": "A fixed text that the visual tokens are added to."})
    num_queries: int = field(default=77, metadata={"help": "Context tokens made of the visual tokens."})
    resampler_dim: int = field(default=768, metadata={"help": "Width of the conditioner's resampler."})
    resampler_layers: int = field(default=2, metadata={"help": "Layers of the conditioner's resampler."})
    resampler_heads: int = field(default=12, metadata={"help": "Attention heads of the conditioner's resampler."})
    dtype: str = field(default="float32", metadata={"help": f"Precision of the denoiser: {', '.join(DTYPES)}."})
    image_size: int | None = field(default=None, metadata={"help": "Side of what the generator restores, in pixels."})
    quantization: str | None = field(default=None, metadata={"help": f"One of {', '.join(QUANTIZATIONS)}."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute the denoiser's activations."})
    cpu_offload: bool = field(default=False, metadata={"help": "Keep the generator on the CPU between feedbacks."})
    channels_last: bool = field(default=False, metadata={"help": "Lay convolutions out channel by channel."})
    compile_denoiser: bool = field(default=False, metadata={"help": "Compile the denoiser alone."})
    latent_cache: str | None = field(default=None, metadata={"help": "Folder that `deem cache-latents` has filled."})
    anchor_weight: float = field(default=0.0, metadata={"help": "Factor on the distance to the tower as it was."})
    conditioner_only: bool = field(default=False, metadata={"help": "Train the conditioner on a frozen tower."})
    conditioner: str | None = field(default=None, metadata={"help": "Folder of the conditioner to start from."})
    official_defects: bool = field(default=False, metadata={"help": "Reproduce the defects of the published code."})
    in_eval: bool = field(default=False, metadata={"help": "Compute and log `eval_feedback_loss` in evaluation."})
    image_mean: list[float] | None = field(default=None, metadata={"help": "Mean of `pixel_values` (RGB)."})
    image_std: list[float] | None = field(default=None, metadata={"help": "Standard deviation of `pixel_values`."})
    seed: int = field(default=0, metadata={"help": "Seed of the conditioner's weights and of the noise."})

    def __post_init__(self):
        for name in ("weight", "anchor_weight"):
            if not 0 <= (given := getattr(self, name)) < math.inf:
                raise ValueError(f"`{name}` must be a finite number, zero or positive, got {given}.")
        for name in (
            "every",
            "token_cells",
            "draws_per_image",
            "num_patches",
            "num_negatives",
            "image_size",
            "max_views_per_image",
        ):
            if (given := getattr(self, name)) is not None and given < 1:
                raise ValueError(f"`{name}` must be at least 1, got {given}.")
        for name, choices in (
            ("weight_schedule", WEIGHT_SCHEDULES),
            ("timestep_sampling", TIMESTEP_SAMPLINGS),
            ("loss_weighting", LOSS_WEIGHTINGS),
            ("source", SOURCES),
            ("condition", CONDITIONS),
            ("objective", OBJECTIVES),
            ("dtype", DTYPES),
        ):
            if (given := getattr(self, name)) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {given!r}.")
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise ValueError(f"`quantization` must be one of {', '.join(QUANTIZATIONS)}, got {self.quantization!r}.")
        if self.quantization is not None and self.cpu_offload:
            raise ValueError(
                f"`quantization: {self.quantization}` keeps its weights on the device, and `cpu_offload` does not. "
                f"Set one of the two."
            )
        if self.weight_schedule == "linear" and self.warmup_steps < 1:
            raise ValueError(
                f"`weight_schedule: linear` needs `warmup_steps` of at least 1, got {self.warmup_steps}. "
                f"Set the ramp's length in optimizer steps, or use `weight_schedule: constant`."
            )
        for name, owner, value in (
            ("num_patches", "condition", "cls+patches"),
            ("num_negatives", "objective", "contrastive"),
            ("official_defects", "objective", "contrastive"),
        ):
            if getattr(self, name) and getattr(self, owner) != value:
                raise ValueError(
                    f"`{name}` belongs to `{owner}: {value}`, and `{owner}` is {getattr(self, owner)!r}. Leave "
                    f"`{name}` out or set `{owner}: {value}`."
                )
        if self.objective == "contrastive" and (self.draws_per_image > 1 or self.loss_weighting != "uniform"):
            raise ValueError(
                "`objective: contrastive` draws once an image and weighs all timesteps alike. Leave `draws_per_image` "
                "and `loss_weighting` out, or set `objective: mse`."
            )
        if self.shows_maps and (self.objective != "mse" or self.draws_per_image > 1):
            raise ValueError(
                "`condition: queries+dense` shows the maps of a picture in one run of the UNet: it is for `objective: "
                "mse` and one draw an image. Leave the other settings out, or set `condition: queries`."
            )
        alone = [name for name in SAVINGS if name != "channels_last" and getattr(self, name)]
        if self.shows_maps and alone:
            raise ValueError(
                f"`condition: queries+dense` trains a synchroniser within the denoiser's own run, which {alone} would "
                f"repeat, move or compile without it. Leave them out, or set `condition: queries`."
            )
        if self.source == "llm":
            settings = {"condition": "queries", "objective": "mse", "prompt": None, "anchor_weight": 0.0}
            settings |= {"conditioner_only": False, "latent_cache": None, "image_size": None, "quantization": None}
            settings |= dict.fromkeys(SAVINGS, False)
            other = [name for name, value in settings.items() if getattr(self, name) != value]
            if other:
                raise ValueError(
                    f"`source: llm` shows a denoiser of its own the language model's outputs, so that {other} mean "
                    f"nothing there. Leave them out, or set `source: tower`."
                )
        if self.conditioner_only and self.anchor_weight:
            raise ValueError("A frozen tower cannot drift: leave `anchor_weight` out where `conditioner_only` is set.")
        if self.resampler_dim % self.resampler_heads:
            raise ValueError(
                f"`resampler_dim` ({self.resampler_dim}) must be a multiple of `resampler_heads` "
                f"({self.resampler_heads})."
            )
        if (self.image_mean is None) != (self.image_std is None):
            raise ValueError("Give both `image_mean` and `image_std`, or neither (then the processor's are used).")

    @property
    def reads_pooled(self) -> bool:
        """Whether the generator is shown the tower's pooled vector."""
        return self.condition in ("cls", "cls+patches")

    @property
    def shows_maps(self) -> bool:
        """Whether the generator looks at the tower's maps while it runs."""
        return self.condition == "queries+dense"

    def weight_at(self, step: int) -> float:
        """Returns the factor on the feedback loss at optimizer step `step` (from 0); 0 when the step is left out."""
        if step % self.every:
            return 0.0
        if self.weight_schedule == "linear":
            return self.weight * min(1.0, (step + 1) / self.warmup_steps)
        return self.weight
