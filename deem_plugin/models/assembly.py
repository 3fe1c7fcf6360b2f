"""assemble_deem: an interleaved model of pretrained parts."""

import copy

from ..vision.image_processing import build_image_processor
from ..vision.processors import join_parts
from .configuration import DeemConfig
from .deem import DeemForConditionalGeneration
from .processing import IMAGE_START_TOKEN, IMAGE_TOKEN, DeemProcessor


def assemble_deem(language_model, tokenizer, tower, extra_tokens=(), target_size=None, **options):
    """
    Makes a DEEM of a causal language model and a vision tower; connector, heads and image decoder are new.

    The parts are not copied and not changed: they now belong to the model. The tokenizer is copied.

    Args:
        language_model (`PreTrainedModel`): Any causal language model of transformers.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        tower (`DeemVisionTower`): With a resampler and without a class token, as in the paper.
        extra_tokens (`Sequence[str]`, *optional*): Further new tokens, behind the two of pictures.
        target_size (`int`, *optional*): Side of `target_pixel_values`, in pixels; see [`DeemImageProcessor`].
        options: Fields of [`DeemConfig`], such as `context_dim`.

    Returns:
        `tuple[DeemForConditionalGeneration, DeemProcessor]`: Model and processor.

    Raises:
        ValueError: If the tokenizer already knows a new token, or has more tokens than the language model.
    """
    tokenizer = copy.deepcopy(tokenizer)
    config = DeemConfig(
        text_config=language_model.config.to_dict(),
        vision_config=tower.config.to_dict(),
        **add_new_tokens(tokenizer, extra_tokens),
        **options,
    )
    model = DeemForConditionalGeneration(config, language_model=language_model, vision_tower=tower)
    model.generation_config = copy.deepcopy(language_model.generation_config)
    if not model.generation_config.do_sample:  # Vicuna's sets these all the same, and could not be saved
        model.generation_config.update(temperature=None, top_p=None, top_k=None)
    stop_at_pictures(model)
    return model, processor_of(config, tokenizer, tokenizer.chat_template, target_size)


def add_new_tokens(tokenizer, extra_tokens=()) -> dict:
    """
    Adds the tokens of pictures to a tokenizer, which is changed, and further ones behind them.

    Returns:
        `dict`: `num_new_tokens` and `first_new_token_id` of a [`DeemConfig`].

    Raises:
        ValueError: If the tokenizer already knows one of them, or has ids that are higher than theirs.
    """
    tokens = [IMAGE_START_TOKEN, IMAGE_TOKEN, *extra_tokens]
    if known := [token for token in tokens if token in tokenizer.get_vocab()]:
        raise ValueError(
            f"The tokenizer already knows {known}; expected that of a language model without pictures. Take the "
            f"checkpoint that the model was made of."
        )
    tokenizer.add_special_tokens({"additional_special_tokens": tokens}, replace_extra_special_tokens=False)
    # Not the number of tokens: some vocabularies have gaps.
    first, *others = tokenizer.convert_tokens_to_ids(tokens)
    last = max(tokenizer.get_vocab().values())
    if [first, *others] != list(range(last - len(others), last + 1)):
        raise ValueError(
            f"The new tokens got the ids {[first, *others]} among the tokenizer's own, which go up to {last}; a DEEM "
            f"tells them apart by their ids. Give the tokens of the vocabulary ids without a gap."
        )
    return {"num_new_tokens": len(tokens), "first_new_token_id": first}


def stop_at_pictures(model):
    """Ends a text where a picture would begin, unless somebody draws it and goes on (`generate_interleaved`)."""
    config = model.generation_config
    config.eos_token_id = with_end(config.eos_token_id, model.config.image_start_token_id)


def with_end(ends: int | list[int] | None, end: int) -> list[int]:
    """Returns tokens that end a text, as `generate` takes them, with one more."""
    ends = [ends] if isinstance(ends, int) else ends or []
    return [*ends, *({end} - set(ends))]


def processor_of(config, tokenizer, chat_template=None, target_size=None) -> DeemProcessor:
    """
    Makes the processor of a model.

    Args:
        config (`DeemConfig`): Of the model.
        tokenizer (`PreTrainedTokenizerBase`): With the new tokens.
        chat_template (`str`, *optional*): Of the language model, see [`~deem_plugin.vision.processors.join_parts`].
        target_size (`int`, *optional*): As in [`assemble_deem`].
    """
    return DeemProcessor(
        image_processor=build_image_processor(config.vision_config, target_size=target_size),
        tokenizer=tokenizer,
        num_image_tokens=config.vision_config.num_image_tokens,
        chat_template=join_parts(chat_template, IMAGE_TOKEN) if chat_template else None,
    )
