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
    new_tokens = [IMAGE_START_TOKEN, IMAGE_TOKEN, *extra_tokens]
    if known := [token for token in new_tokens if token in tokenizer.get_vocab()]:
        raise ValueError(
            f"The tokenizer already knows {known}; expected that of a language model without pictures. Take the "
            f"checkpoint that the model was made of."
        )
    first = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": new_tokens}, replace_extra_special_tokens=False)
    config = DeemConfig(
        text_config=language_model.config.to_dict(),
        vision_config=tower.config.to_dict(),
        num_new_tokens=len(new_tokens),
        first_new_token_id=first,
        **options,
    )
    model = DeemForConditionalGeneration(config, language_model=language_model, vision_tower=tower)
    model.generation_config = copy.deepcopy(language_model.generation_config)
    ends = model.generation_config.eos_token_id
    # A text ends where a picture would begin, unless somebody draws it and goes on (`generate_interleaved`).
    model.generation_config.eos_token_id = [
        *([ends] if isinstance(ends, int) else ends or []),
        config.image_start_token_id,
    ]
    processor = DeemProcessor(
        image_processor=build_image_processor(tower, target_size=target_size),
        tokenizer=tokenizer,
        num_image_tokens=tower.config.num_image_tokens,
        chat_template=join_parts(tokenizer.chat_template, IMAGE_TOKEN) if tokenizer.chat_template else None,
    )
    return model, processor
