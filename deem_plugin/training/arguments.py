"""What a recipe may say about the model and the data."""

import math
from dataclasses import dataclass, field

DTYPES = ("auto", "float32", "bfloat16", "float16")
TOWER_ONLY = (
    "`model.{name}` belongs to `model.vision_tower`, which is not set. Set `vision_tower: deem` or `deem:<encoder>`, "
    "or leave it out."
)
DATA_KINDS = ("conversations", "documents", "shards", "regions")
# The three ways to name what is trained; a recipe takes exactly one.
SOURCES = ("model", "language_model", "encoder")


@dataclass
class LoraArguments:
    """
    LoRA (https://arxiv.org/abs/2106.09685) on parts of the model.

    Args:
        r (`int`, *optional*, defaults to 0): Its rank; 0 is no LoRA.
        alpha (`int`, *optional*, defaults to 32): Its scale is `alpha / r`.
        dropout (`float`, *optional*, defaults to 0.05): Dropout before its matrices, in [0, 1).
        modules (`list[str]`, *optional*): Patterns of the parts whose linear layers get it.
        full (`list[str]`, *optional*): Patterns of modules that train in full beside it.
    """

    r: int = 0
    alpha: int = 32
    dropout: float = 0.05
    modules: list[str] = field(default_factory=lambda: ["language_model"])
    full: list[str] = field(default_factory=list)

    def __post_init__(self):
        if self.r < 0 or not 0 <= self.dropout < 1:
            raise ValueError(f"`model.lora` needs r >= 0 and 0 <= dropout < 1, got {self.r} and {self.dropout}.")


@dataclass
class ModelArguments:
    """
    Which model is trained, and which of its parts.

    A *pattern* names parts of the model by their dotted parameter names: `vision_tower` is every parameter below a
    module of that name, `vision_tower.encoder.layers.0` its first layer, and `*` stands for one name in between. A
    pattern that matches nothing is an error.

    Args:
        model (`str`, *optional*): Folder or hub id of a VLM with its processor.
        language_model (`str`, *optional*):
            Folder or hub id of a language model, to assemble a LLaVA of it and `vision_tower`; the projector is new.
        encoder (`str`, *optional*):
            Folder or hub id of a vision encoder (CLIP, SigLIP, DINOv2, ...) to train alone, on images only.
        vision_tower (`str`, *optional*): `deem` (the paper's ConvNeXt, resampled to 77 queries), `deem:<encoder>`, or
            nothing for the VLM's own. It takes the place of a LLaVA's, with a new projector.
        vision_pretrained (`str` or `bool`, *optional*):
            Weights of the tower's encoder: for open_clip a tag or a file; `false` for new ones.
        image_size (`int`, *optional*): Side of the tower's square input in pixels; by default the encoder's own. Of a
            saved DEEM (section `deem`) it may change from stage to stage, since a ConvNeXt reads any size.
        num_queries (`int`, *optional*): Queries that the tower resamples its patches to; 0 leaves the grid of patches.
            By default 77 for `deem` and 0 for `deem:<encoder>`.
        chat_template (`str`, *optional*): Jinja file with the chat template, for models that come without one. A
            relative path is also looked for beside the recipe.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Precision of the weights. Small learning rates need float32 weights: a step of 1e-6 is lost in bfloat16.
            For speed set `training.bf16: true`, which computes in bfloat16 and keeps the weights as they are.
        attn_implementation (`str`, *optional*): `sdpa`, `eager`, `flash_attention_2`, ...
        freeze (`list[str]`, *optional*): Patterns of what is not trained.
        learning_rates (`dict[str, float]`, *optional*):
            Pattern to learning rate, for parts that differ from `training.learning_rate`; a later pattern wins.
        lora (`LoraArguments`, *optional*): LoRA in place of full training.
    """

    model: str | None = None
    language_model: str | None = None
    encoder: str | None = None
    vision_tower: str | None = None
    vision_pretrained: str | bool | None = None
    image_size: int | None = None
    num_queries: int | None = None
    chat_template: str | None = None
    dtype: str = "float32"
    attn_implementation: str | None = None
    freeze: list[str] = field(default_factory=list)
    learning_rates: dict[str, float] = field(default_factory=dict)
    lora: LoraArguments = field(default_factory=LoraArguments)

    def __post_init__(self):
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"The section `model` must name exactly one of {', '.join(f'`{name}`' for name in SOURCES)} (a VLM, "
                f"a language model to assemble one from, or an encoder to train alone), got {given or 'none'}."
            )
        if not all(0 <= rate < math.inf for rate in self.learning_rates.values()):
            raise ValueError(f"`model.learning_rates` must be numbers from 0 up, got {self.learning_rates}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"`model.dtype` must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if self.language_model is not None and self.vision_tower is None:
            raise ValueError(
                "`model.language_model` needs `model.vision_tower`: a language model has no tower of its own. Set "
                "`deem` or `deem:<encoder>`."
            )
        if self.vision_tower is None and self.vision_pretrained is not None:
            raise ValueError(TOWER_ONLY.format(name="vision_pretrained"))

    def source(self) -> tuple[str, str]:
        """Returns the setting that names what is trained, and its folder or hub id."""
        return next((f"model.{name}", getattr(self, name)) for name in SOURCES if getattr(self, name) is not None)

    def loading(self) -> dict:
        """Returns how a model is loaded, as arguments of `from_pretrained`."""
        # Code that a folder brings is never run, and nobody is asked.
        options = {"dtype": self.dtype, "attn_implementation": self.attn_implementation, "trust_remote_code": False}
        return {name: value for name, value in options.items() if value is not None}

    def tower(self) -> dict:
        """Returns how a tower of our own is built, as arguments of [`build_vision_tower`]."""
        return {"name": self.vision_tower, "image_size": self.image_size, "num_queries": self.num_queries}


@dataclass
class DeemArguments:
    """
    The interleaved model of DEEM (https://arxiv.org/abs/2405.15232): its losses and what gives them.

    With this section `model.language_model` is assembled into a DEEM instead of a LLaVA; `model.model` is one that an
    earlier stage has saved. Its feedback is one of its own losses, so the recipe has no section `feedback`.

    Args:
        denoiser (`str`, *optional*): Folder or hub id of the frozen diffusion model, in diffusers' layout. Needed
            unless both weights below are 0.
        dtype (`str`, *optional*, defaults to `"float32"`): Precision of the denoiser.
        lm_weight, image_weight, feedback_weight (`float`, *optional*, defaults to 1, 5 and 5): Factors on the losses
            of the next token, the next image and the same image; 0 leaves a loss out. The first two are means; the
            last is the sum over the images of a step by its documents.
        feedback_timesteps (`str`, *optional*, defaults to `"shrink"`): One of `TIMESTEP_SAMPLERS`.
        null_context_rate (`float`, *optional*, defaults to 0.1): Share of pictures that are learned without their
            context, for classifier-free guidance.
        language_synchroniser (`dict`, *optional*): Options of the language model's synchroniser, `{frequency: 4}` in
            the paper; none without it. For assembling only, like the two below: a saved model has what it has.
        unet_synchroniser (`bool`, *optional*, defaults to `False`): Whether the next image also sees the maps of the
            one before it, as in the paper.
        region_tokens (`bool`, *optional*, defaults to `False`): Whether the queries also read tokens made of the
            region and its maps (the official `mask_align`).
        target_size (`int`, *optional*): Side in pixels of the pictures that the diffusion model restores, where it is
            more than the tower sees.
    """

    denoiser: str | None = None
    dtype: str = "float32"
    lm_weight: float = 1.0
    image_weight: float = 5.0
    feedback_weight: float = 5.0
    feedback_timesteps: str = "shrink"
    null_context_rate: float = 0.1
    language_synchroniser: dict | None = None
    unet_synchroniser: bool = False
    region_tokens: bool = False
    target_size: int | None = None

    def __post_init__(self):
        if (self.image_weight or self.feedback_weight) and self.denoiser is None:
            raise ValueError(
                "`deem.image_weight` and `deem.feedback_weight` need a diffusion model: set `deem.denoiser` to a "
                "folder or hub id in diffusers' layout, or both weights to 0."
            )


@dataclass
class DenoiserArguments:
    """
    A denoiser of one's own, as `deem train-denoiser` trains it (GenHancer, https://arxiv.org/abs/2503.19480).

    Args:
        network (`str`): Class of diffusers, one that `feedback.diffusion_model.path` may have.
        config (`dict`): The arguments of that class; channels and size are filled in.
        image_size (`int`): Side of the pictures that it is trained on, in pixels.
        autoencoder (`str`, *optional*): Diffusion model whose autoencoder it shares; without one it works on pixels.
    """

    network: str = "FluxTransformer2DModel"
    config: dict = field(default_factory=dict)
    image_size: int = 224
    autoencoder: str | None = None


@dataclass
class DataArguments:
    """
    What the model is trained on.

    Args:
        path (`str`):
            Conversations as [`~deem_plugin.data.conversations.list_conversations`] takes them; for an encoder alone
            pictures as [`~deem_plugin.data.shards.list_pictures`] does: a folder, tar files in it, or a glob of these.
        kind (`str`, *optional*, defaults to `"conversations"`): `conversations`, or for the interleaved model also
            `documents`, as [`~deem_plugin.data.document_files.list_documents`] takes them, `shards` or `regions`.
        interleaved, pairs (`str`, *optional*): Of `shards`: tar files (a path, an address or a glob) of MMC4's
            documents and of captioned pictures, see [`~deem_plugin.data.shards`].
        weights (`list[float]`, *optional*, defaults to `[2, 1]`): Of `shards`: how often each of the two comes.
        sources (`list[dict]`, *optional*):
            Of `regions`: published data sets, as [`~deem_plugin.data.region_sets.list_regions`] takes them.
        on_error (`str`, *optional*, defaults to `"raise"`):
            What is done about a sample that is wrong: `raise`, or `skip` and count it.
        image_dir (`str`, *optional*): Folder that the image paths are relative to; by default the data's own.
        allow_outside (`bool`, *optional*, defaults to `False`): Of conversations and documents: whether image paths
            may lead out of that folder, by `..`, by links, or by being absolute.
        max_length (`int`, *optional*): Longest conversation in tokens; what is beyond is cut off, images never. Of
            documents the length of a row, into which they are packed.
        crop_area (`float`, *optional*): For an encoder alone: crops each picture at random, keeping so much of its
            area at least; by default the image processor's own geometry.
        target_size (`int`, *optional*): With `crop_area`: side of the crop that the diffusion model restores, in
            pixels, where it is more than the encoder sees.
        cache_dir (`str`, *optional*): Where the memory-mapped tables are kept; the `datasets` cache by default.
    """

    path: str | None = None
    kind: str = "conversations"
    interleaved: str | None = None
    pairs: str | None = None
    weights: list[float] = field(default_factory=lambda: [2.0, 1.0])
    sources: list[dict] = field(default_factory=list)
    on_error: str = "raise"
    image_dir: str | None = None
    allow_outside: bool = False
    max_length: int | None = None
    crop_area: float | None = None
    target_size: int | None = None
    cache_dir: str | None = None

    def __post_init__(self):
        if self.kind == "regions":
            if not self.sources:
                raise ValueError(
                    "`data.kind: regions` needs data sets: set `data.sources` to a list of them, each with `format`, "
                    "`image_dir` and its files."
                )
        elif self.kind == "shards":
            if self.interleaved is None and self.pairs is None:
                raise ValueError("`data.kind: shards` needs tar files: set `data.interleaved`, `data.pairs`, or both.")
        elif self.path is None:
            raise ValueError(
                "The recipe does not say what to train on. Set `data.path` to a LLaVA .json or .jsonl file, a data "
                "set with `messages` and `images`, or, for an encoder alone, a folder of pictures."
            )
        if self.kind not in DATA_KINDS:
            raise ValueError(f"`data.kind` must be one of {', '.join(DATA_KINDS)}, got {self.kind!r}.")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"`data.max_length` must be at least 1, got {self.max_length}.")
        if len(self.weights) != 2 or not all(0 <= weight < math.inf for weight in self.weights):
            raise ValueError(f"`data.weights` must be two numbers from 0 up, got {self.weights}.")
        if self.crop_area is not None and not 0 < self.crop_area <= 1:
            raise ValueError(f"`data.crop_area` is a share of a picture's area, in (0, 1]; got {self.crop_area}.")
        if self.target_size is not None and self.crop_area is None:
            raise ValueError(
                "`data.target_size` is the side of a random crop. Set `data.crop_area` too (0.9 in DIVA), or leave it "
                "out: the diffusion model then restores what the encoder sees."
            )
