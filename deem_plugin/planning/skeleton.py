"""The model of a recipe without weights: made of configs alone, of fake tensors, which take no memory."""

from dataclasses import dataclass, replace
from inspect import signature

import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from deem_plugin.planning.fakes import FakeWeightsMode, put_fakes
from deem_plugin.training.arguments import ModelArguments
from deem_plugin.training.encoder import vision_part
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
# Width and height of the picture that other families' image processors are given, in pixels.
PICTURE_SIZE = (448, 448)


@dataclass
class Skeleton:
    """
    All modules of a run, of fake tensors, frozen and wrapped as the run would have them.

    Args:
        model (`nn.Module`): What the Trainer would get, the feedback's conditioner in it.
        tower (`PreTrainedModel`): Its vision tower.
        diffusion_model (`DiffusionModel`, *optional*): The frozen diffusion model; its scheduler is real.
        hook (`FeedbackHook`, *optional*): The feedback's hook on the tower.
        mode (`FakeWeightsMode`): In which it computes.
        picture (`dict[str, torch.Tensor]`): What the model is given of one picture, with values.
        image_tokens (`int`): Tokens that a picture takes in the language model; 0 for an encoder alone.
        notes (`list[str]`): What had to be supposed.
    """

    model: nn.Module
    tower: nn.Module
    diffusion_model: object | None
    hook: object | None
    mode: FakeWeightsMode
    picture: dict[str, torch.Tensor]
    image_tokens: int
    notes: list[str]


def build_skeleton(recipe: Recipe) -> Skeleton:
    """
    Makes the modules of a run without their weights.

    Args:
        recipe (`Recipe`): Folders and hub ids that it names need to hold their configs only.

    Raises:
        ValueError: If a config cannot be found, or the recipe does not fit together.
    """
    arguments, notes, mode, image_tokens = recipe.model, [], FakeWeightsMode(), 0
    if arguments.encoder is not None:
        whole = _from_config(AutoModel, arguments.encoder, "model.encoder", arguments)
        model = vision_part(whole, recipe.feedback is not None and recipe.feedback.condition.reads_pooled)
    else:
        with torch.device("meta"):
            model = _vlm(arguments, notes)
    tower = find_tower(model)
    if arguments.lora.r:
        with torch.device("meta"):
            model = add_lora(model, arguments)
    put_fakes(model, mode)
    freeze(model, arguments.freeze)
    with mode:
        picture = _picture(model, tower, arguments, notes)
        if arguments.encoder is None:
            image_tokens = _count_image_tokens(without_peft(model), picture)
            freeze_unread_layers(model)
    diffusion_model, hook = _attach_feedback(recipe, model, mode)
    return Skeleton(model, tower, diffusion_model, hook, mode, picture, image_tokens, notes)


def _picture(model, tower, arguments: ModelArguments, notes: list[str]) -> dict[str, torch.Tensor]:
    """
    Returns what a model is given of one picture: a square of the tower's size, or what the image processor makes of
    `PICTURE_SIZE` where that depends on the picture.
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
    notes.append(f"Supposed are pictures of {PICTURE_SIZE[0]} x {PICTURE_SIZE[1]} pixels.")
    inputs = process_image(image_processor, Image.new("RGB", PICTURE_SIZE))
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
    try:
        config = AutoConfig.from_pretrained(path)
    except OSError as error:
        raise ValueError(
            f"The config of `{setting}: {path}` cannot be read: it is neither a folder with a config.json nor a hub "
            f"id that can be reached from here. A plan needs no weights: give a folder that holds the config.json "
            f"alone (`{setting}=FOLDER`), or go online."
        ) from error
    dtype = config.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    with torch.device("meta"):
        return auto_class.from_config(config, **arguments.loading() | {"dtype": dtype or torch.float32})


def _tokenizer(path: str, vocabulary_size: int, notes: list[str]):
    """Loads the tokenizer, or makes one of as many words where only the model's config is at hand."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    try:
        return AutoTokenizer.from_pretrained(path)
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


def _attach_feedback(recipe: Recipe, model, mode: FakeWeightsMode):
    """Loads the diffusion model without weights and attaches the feedback; `(None, None)` without one."""
    from deem_plugin.feedback.callback import DiffusionFeedbackCallback
    from deem_plugin.feedback.factory import load_configured

    if recipe.feedback is None:
        return None, None
    config = recipe.feedback
    diffusion_model = load_configured(config.diffusion_model, weights=False)
    for module in diffusion_model.modules():
        put_fakes(module, mode)
    # The processor may be missing, and whatever the normalisation is, the work is the same.
    # A cache is known by the weights of the VAE, and there are none: the plan counts the run without. A prompt and
    # the values that a conditioner starts from change no count.
    config = replace(
        config,
        diffusion_model=replace(config.diffusion_model, latent_cache=None, compile=False),
        condition=replace(config.condition, prompt=None),
        conditioner=None,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
    )
    callback = DiffusionFeedbackCallback(config, diffusion_model)
    with mode:
        callback.attach(model)
    put_fakes(model, mode)  # the conditioner
    return diffusion_model, callback.hook
