"""The model of a recipe without weights: made of configs alone, of fake tensors, which take no memory."""

import math
from dataclasses import dataclass, field, fields, replace
from inspect import signature

import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from deem_plugin.feedback.config import RossConfig
from deem_plugin.feedback.diffusion_model import DiffusionModel, load_autoencoder, load_diffusion_model
from deem_plugin.hub import at_revision
from deem_plugin.planning.fakes import FakeWeightsMode, put_fakes
from deem_plugin.training.arguments import ModelArguments
from deem_plugin.training.encoder import vision_part
from deem_plugin.training.interleaved import assemble, finish, stage_config
from deem_plugin.training.model import add_lora, freeze_unread_layers
from deem_plugin.training.parts import freeze
from deem_plugin.training.recipes import Recipe
from deem_plugin.vision import build_vision_tower
from deem_plugin.vision.llava import IMAGE_TOKEN, assemble_llava
from deem_plugin.vision.normalization import find_image_processor, process_image
from deem_plugin.vision.probe import cast
from deem_plugin.vision.towers import find_tower, without_peft

# VLMs whose tower gets one row of `pixel_values` a picture, whatever the picture's size: their config says it all.
SQUARE_MODELS = ("llava", "vipllava")
# Width and height of the picture that other families' image processors are given by default, in pixels.
PICTURE_SIZE = (448, 448)


class PlacedDiffusionModel(DiffusionModel):
    """A diffusion model that is where it is needed: modules of fake tensors cannot be moved."""

    def to(self, device):
        """Returns the diffusion model."""
        return self


@dataclass
class Skeleton:
    """
    All modules of a run, of fake tensors, frozen and wrapped as the run would have them.

    Args:
        model (`nn.Module`): What the Trainer would get, the feedback's conditioner in it.
        tower (`PreTrainedModel`): Its vision tower.
        mode (`FakeWeightsMode`): In which it computes.
        picture (`dict[str, torch.Tensor]`): What the model is given of one picture, with values.
        image_tokens (`int`): Tokens that a picture takes in the language model; 0 where there is none.
        notes (`list[str]`): What had to be supposed.
        diffusion_model (`DiffusionModel`, *optional*): What the loss asks; its scheduler is real.
        hook (`FeedbackHook`, *optional*): The feedback's hook on the tower.
        frozen (`dict[str, nn.Module]`): What there is beside the model, by name.
    """

    model: nn.Module
    tower: nn.Module
    mode: FakeWeightsMode
    picture: dict[str, torch.Tensor]
    image_tokens: int
    notes: list[str]
    diffusion_model: DiffusionModel | None = None
    hook: object | None = None
    frozen: dict[str, nn.Module] = field(default_factory=dict)


def build_skeleton(recipe: Recipe, picture_size: tuple[int, int] = PICTURE_SIZE) -> Skeleton:
    """
    Makes the modules of a run without their weights.

    Args:
        recipe (`Recipe`): Folders and hub ids that it names need to hold their configs only.
        picture_size (`tuple[int, int]`): Width and height in pixels of the pictures, where the model cares.

    Raises:
        ValueError: If a config cannot be found, or the recipe does not fit together.
    """
    arguments, mode = recipe.model, FakeWeightsMode()
    if recipe.denoiser is not None:
        return _denoiser_skeleton(recipe, mode)
    if recipe.deem is not None:
        return _deem_skeleton(recipe, mode)
    notes, image_tokens = [], 0
    model = _encoder(recipe)
    if model is None:
        with torch.device("meta"):
            model = _vlm(arguments, notes)
    tower = find_tower(model)
    if arguments.lora.r:
        with torch.device("meta"):
            model = add_lora(model, arguments)
    put_fakes(model, mode)
    freeze(model, arguments.freeze)
    with mode:
        picture = _picture(model, tower, arguments, picture_size, notes)
        if arguments.encoder is None:
            image_tokens = _count_image_tokens(without_peft(model), picture)
            freeze_unread_layers(model)
    skeleton = Skeleton(model, tower, mode, picture, image_tokens, notes)
    if recipe.feedback is not None:
        _attach_feedback(recipe.feedback, skeleton)
    return skeleton


def _encoder(recipe: Recipe):
    """Makes the encoder that a recipe names, on the meta device; None if it names none."""
    if recipe.model.encoder is None:
        return None
    whole = _from_config(AutoModel, recipe.model.encoder, "model.encoder", recipe.model)
    reads_pooled = recipe.feedback is not None and recipe.feedback.condition.reads_pooled
    return vision_part(whole, reads_pooled)


def _placed(diffusion_model: DiffusionModel, mode: FakeWeightsMode) -> PlacedDiffusionModel:
    """Returns a diffusion model of fake tensors in place of one on the meta device."""
    placed = PlacedDiffusionModel(**{f.name: getattr(diffusion_model, f.name) for f in fields(DiffusionModel)})
    for module in _networks(placed).values():
        put_fakes(module, mode)
    return placed


def _networks(diffusion_model: DiffusionModel | None) -> dict[str, nn.Module]:
    """Returns the networks of a diffusion model by name."""
    networks = {}
    if diffusion_model is not None and diffusion_model.denoiser is not None:
        networks["denoiser"] = diffusion_model.denoiser.model
    if hasattr(getattr(diffusion_model, "codec", None), "vae"):
        networks["autoencoder"] = diffusion_model.codec.vae
    return networks


def _deem_skeleton(recipe: Recipe, mode: FakeWeightsMode) -> Skeleton:
    """Makes the interleaved model that `training.interleaved.load_deem` would load or assemble."""
    arguments, deem, notes, diffusion_model = recipe.model, recipe.deem, [], None
    if deem.denoiser is not None:
        diffusion_model = _placed(load_diffusion_model(deem.denoiser, deem.dtype, weights=False), mode)
    if arguments.language_model is not None:
        setting, path = arguments.source()
        language_model = _from_config(AutoModelForCausalLM, path, setting, arguments)
        tokenizer = _tokenizer(path, language_model.get_input_embeddings().num_embeddings, notes)
        with torch.device("meta"):
            model, _ = assemble(arguments, deem, language_model, tokenizer, diffusion_model, pretrained=False)
    else:
        with torch.device("meta"):
            config = stage_config(_config(arguments.model, "model.model"), arguments)
            model = AutoModelForImageTextToText.from_config(config, **arguments.loading())
    finish(model, deem, diffusion_model)
    if arguments.lora.r:
        with torch.device("meta"):
            model = add_lora(model, arguments)
    put_fakes(model, mode)
    freeze(model, arguments.freeze)
    tower, size = find_tower(model), without_peft(model).config.vision_config.image_size
    with mode:
        freeze_unread_layers(model)
    picture = {"pixel_values": torch.zeros(1, 3, size, size)}
    if deem.target_size is not None:
        picture["target_pixel_values"] = torch.zeros(1, 3, deem.target_size, deem.target_size)
    notes.append("One picture in the middle of each row; a row of packed documents may hold more.")
    # And the token that says that a picture begins.
    image_tokens = 1 + without_peft(model).config.vision_config.num_image_tokens
    return Skeleton(
        model, tower, mode, picture, image_tokens, notes, diffusion_model, frozen=_networks(diffusion_model)
    )


def _denoiser_skeleton(recipe: Recipe, mode: FakeWeightsMode) -> Skeleton:
    """Makes what `training.denoiser.train_denoiser` would train."""
    from deem_plugin.feedback.factory import make_conditioner
    from deem_plugin.feedback.from_scratch import make_diffusion_model
    from deem_plugin.feedback.latents import PixelCodec
    from deem_plugin.training.denoiser import DenoiserTraining
    from deem_plugin.vision.eyes import Eyes

    shape, config, tower = recipe.denoiser, recipe.feedback, _encoder(recipe)
    put_fakes(tower, mode)
    codec = PixelCodec() if shape.autoencoder is None else load_autoencoder(shape.autoencoder, weights=False).codec
    with torch.device("meta"):
        diffusion_model = make_diffusion_model(shape.network, shape.config, codec, shape.image_size)
    diffusion_model = _placed(diffusion_model, mode)
    with mode:
        eyes = Eyes.of(tower, None, [0.0] * 3, [1.0] * 3)
        conditioner = make_conditioner(config.condition, eyes, diffusion_model.denoiser)
        put_fakes(conditioner, mode)
        model = DenoiserTraining(eyes, conditioner, diffusion_model, config)
    networks = _networks(diffusion_model)
    del networks["denoiser"]  # it trains
    size = tower.config.image_size
    picture = {"pixel_values": torch.zeros(1, 3, size, size)}
    return Skeleton(model, tower, mode, picture, 0, [], diffusion_model, frozen={"encoder": tower, **networks})


def _picture(model, tower, arguments: ModelArguments, size: tuple[int, int], notes: list[str]):
    """
    Returns what a model is given of one picture, tensors by name: a square of the tower's size, or what the image
    processor makes of a picture of `size` where that depends on the picture.
    """
    base = without_peft(model)
    if arguments.model is None or arguments.vision_tower is not None or base.config.model_type in SQUARE_MODELS:
        return {"pixel_values": torch.zeros(1, 3, tower.config.image_size, tower.config.image_size)}
    image_processor = find_image_processor(base, None)
    if image_processor is None:
        raise ValueError(
            f"`model.model: {arguments.model}` is of type '{base.config.model_type}', whose image processor says how "
            f"many tiles or patches a picture has, and there is none. Put its preprocessor_config.json (or "
            f"processor_config.json) beside the config.json."
        )
    notes.append(f"Supposed are pictures of {size[0]} x {size[1]} pixels.")
    inputs = process_image(image_processor, Image.new("RGB", size))
    names = signature(type(base).forward).parameters
    return {name: value for name, value in inputs.items() if name in names}


def _vlm(arguments: ModelArguments, notes: list[str]):
    """Makes the VLM that `training.model.make_model` would load or assemble."""
    setting, path = arguments.source()
    auto_class = AutoModelForImageTextToText if arguments.language_model is None else AutoModelForCausalLM
    source = _from_config(auto_class, path, setting, arguments)
    if arguments.vision_tower is None:
        return source
    tokenizer = _tokenizer(path, source.get_input_embeddings().num_embeddings, notes)
    words = len({*tokenizer.get_vocab(), IMAGE_TOKEN})
    if words > source.get_input_embeddings().num_embeddings:
        # `assemble_llava` would draw the new rows from the statistics of the others, which have no values here.
        source.resize_token_embeddings(words, mean_resizing=False)
    with torch.device("meta"):
        tower = build_vision_tower(**arguments.tower(), pretrained=False)
    return assemble_llava(source, tokenizer, tower)[0]


def _from_config(auto_class, path: str, setting: str, arguments: ModelArguments):
    """Makes a transformers model on the meta device."""
    config = _config(path, setting)
    dtype = config.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    with torch.device("meta"):
        return auto_class.from_config(config, **arguments.loading() | {"dtype": dtype or torch.float32})


def _config(path: str, setting: str):
    try:
        return AutoConfig.from_pretrained(**at_revision(path))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The config of `{setting}: {path}` cannot be read: it is neither a folder with a config.json nor a hub "
            f"id that can be reached from here. A plan needs no weights: give a folder that holds the config.json "
            f"alone (`{setting}=FOLDER`), or go online."
        ) from error


def _tokenizer(path: str, vocabulary_size: int, notes: list[str]):
    """Loads the tokenizer, or makes one of as many words where only the model's config is at hand."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    try:
        return AutoTokenizer.from_pretrained(**at_revision(path))
    except (OSError, ValueError):
        notes.append(
            f"{path} holds no tokenizer: supposed is one of {vocabulary_size:,} words without `<image>`, so "
            f"that the embeddings grow by a row."
        )
        words = {str(index): index for index in range(vocabulary_size)}
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")))


def _count_image_tokens(model, picture) -> int:
    """Returns the number of tokens that the language model gets of one picture."""
    if not hasattr(model, "get_image_features"):
        raise ValueError(
            f"A {type(model).__name__} attends to pictures beside its text, which `deem plan` does not know yet; it "
            f"plans models that have them as tokens in the text."
        )
    names = signature(model.get_image_features).parameters
    with torch.no_grad():
        features = model.get_image_features(**cast({k: v for k, v in picture.items() if k in names}, model))
    features = getattr(features, "pooler_output", features)
    features = torch.cat(list(features)) if isinstance(features, list | tuple) else features
    return features.numel() // features.shape[-1]


def _attach_feedback(config, skeleton: Skeleton):
    """Loads the diffusion model without weights and attaches the feedback."""
    from deem_plugin.feedback.callback import DiffusionFeedbackCallback
    from deem_plugin.feedback.factory import load_configured

    # The processor may be missing, and whatever the normalisation is, the work is the same.
    known = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    if isinstance(config, RossConfig):
        diffusion_model = load_autoencoder(config.autoencoder, weights=False)
        # Pictures are resized to so many cells for each token of a square.
        side = math.isqrt(skeleton.image_tokens) * config.token_cells
        diffusion_model.restored_size = side * diffusion_model.codec.downscale
    else:
        diffusion_model = load_configured(config.diffusion_model, weights=False)
        # A cache is known by the weights of the VAE, and there are none: the plan counts the run without. A prompt
        # and the values that a conditioner starts from change no count.
        known |= {
            "diffusion_model": replace(config.diffusion_model, latent_cache=None, compile=False),
            "condition": replace(config.condition, prompt=None),
            "conditioner": None,
        }
    skeleton.diffusion_model = _placed(diffusion_model, skeleton.mode)
    callback = DiffusionFeedbackCallback(replace(config, **known), skeleton.diffusion_model)
    with skeleton.mode:
        callback.attach(skeleton.model)
    put_fakes(skeleton.model, skeleton.mode)  # the conditioner
    skeleton.hook = callback.hook
    skeleton.hook.checks = False  # their values are asked for
    skeleton.frozen = _networks(skeleton.diffusion_model)
    if skeleton.hook.anchor is not None:
        skeleton.frozen["anchor"] = skeleton.hook.anchor.tower
