"""Makes the model of a recipe: loaded or assembled, its tower mounted, frozen and given LoRA."""

from pathlib import Path

from torch import nn

from deem_plugin.training.arguments import DeemArguments, ModelArguments
from deem_plugin.training.interleaved import load_deem
from deem_plugin.training.parts import find, freeze, matches, resolve


def make_model(arguments: ModelArguments, deem: DeemArguments | None = None):
    """
    Returns the model of a recipe, ready to train, and its processor.

    Args:
        arguments (`ModelArguments`): The recipe's section `model`, with `model` or `language_model` set.
        deem (`DeemArguments`, *optional*): Its section `deem`, where the model is the interleaved one.

    Returns:
        `tuple[PreTrainedModel | PeftModel, ProcessorMixin]`: The VLM and its processor.

    Raises:
        ValueError: If a pattern matches nothing, or the chat template is missing.
    """
    from deem_plugin.vision.processors import join_parts

    model, processor = _load(arguments) if deem is None else load_deem(arguments, deem)
    if arguments.chat_template is not None:
        template = Path(arguments.chat_template)
        if not template.is_file():
            raise ValueError(
                f"The chat template {template} does not exist. Set `model.chat_template` to a Jinja file, or leave it "
                f"out if the model brings one."
            )
        processor.chat_template = template.read_text(encoding="utf-8")
    elif processor.chat_template is None and processor.tokenizer.chat_template is not None:
        # A saved processor comes back with its tokenizer's template, so that one must take images, too.
        processor.chat_template = join_parts(processor.tokenizer.chat_template, processor.image_token)
    if arguments.lora_r:
        model = add_lora(model, arguments)
    freeze(model, arguments.freeze)
    freeze_unread_layers(model, processor.image_processor)
    return model, processor


def _load(arguments: ModelArguments):
    """Loads the VLM, or assembles a LLaVA of a language model and a tower."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    import deem_plugin.vision.auto  # noqa: F401  # so that checkpoints with our tower load
    from deem_plugin.vision import assemble_llava, build_vision_tower

    options = {"dtype": arguments.dtype}
    if arguments.attn_implementation is not None:
        options["attn_implementation"] = arguments.attn_implementation
    if arguments.language_model is not None:
        source = AutoModelForCausalLM.from_pretrained(arguments.language_model, **options)
        tokenizer, template = AutoTokenizer.from_pretrained(arguments.language_model), None
    else:
        source = AutoModelForImageTextToText.from_pretrained(arguments.model, **options)
        processor = AutoProcessor.from_pretrained(arguments.model)
        if arguments.vision_tower is None:
            return source, processor
        tokenizer, template = processor.tokenizer, processor.chat_template
    tower = build_vision_tower(
        arguments.vision_tower,
        pretrained=arguments.vision_pretrained,
        image_size=arguments.image_size,
        num_queries=arguments.num_queries,
    )
    model, processor = assemble_llava(source, tokenizer, tower)
    processor.chat_template = template or processor.chat_template
    return model, processor


def add_lora(model, arguments: ModelArguments):
    """
    Puts LoRA on the linear layers of the parts that `lora_modules` names, and freezes the rest but `lora_full`.

    Raises:
        ValueError: If a pattern of `lora_modules` or `lora_full` matches nothing; lists the parts.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import PreTrainedModel

    for pattern in arguments.lora_modules:
        find(model, pattern, "model.lora_modules")
    lora_modules = [resolve(model, pattern) for pattern in arguments.lora_modules]
    # torch's MultiheadAttention reads the weight of its `out_proj` itself, past any adapter around the layer.
    opaque = {
        f"{name}.out_proj" for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)
    }
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and name not in opaque
        and any(matches(pattern, name) for pattern in lora_modules)
    ]
    full = []
    for pattern in arguments.lora_full:
        find(model, pattern, "model.lora_full")
        pattern = resolve(model, pattern)
        full += [name for name, _ in model.named_modules() if name == pattern or name.endswith(f".{pattern}")]
    overlap = sorted(name for name in targets if any(name == part or name.startswith(f"{part}.") for part in full))
    if overlap:
        raise ValueError(
            f"`model.lora_full` trains in full what `model.lora_modules` puts LoRA on ({overlap[0]!r} and "
            f"{len(overlap) - 1} more). Name a part in one of them only."
        )
    config = LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=targets,
        modules_to_save=full or None,
    )
    return get_peft_model(model, config)


def freeze_unread_layers(model, image_processor=None) -> list[str]:
    """
    Freezes what the language model never reads of the tower, as its [`Eyes`] have measured it.

    A LLaVA reads the second-last layer of its tower, so that the last one never gets a gradient. Left trainable, it
    makes DistributedDataParallel fail or, with gradient checkpointing, reduce wrong gradients silently.

    Args:
        model (`nn.Module`): The VLM, also behind PEFT.
        image_processor (*optional*): Makes the picture that it is measured on; by default one of the tower's size.

    Returns:
        `list[str]`: Names of the frozen parameters, as seen from the tower.
    """
    from deem_plugin.vision.eyes import Eyes
    from deem_plugin.vision.towers import find_tower, without_peft

    tower = find_tower(without_peft(model))
    trainable = {name: value for name, value in tower.named_parameters() if value.requires_grad}
    if not trainable:
        return []
    # Without an image processor, whatever the normalisation is, what is read is the same.
    statistics = {"mean": [0.0] * 3, "std": [1.0] * 3} if image_processor is None else {}
    read = Eyes.of(model, image_processor, **statistics).read_parameters
    unread = [name for name in trainable if name not in read]
    for name in unread:
        trainable[name].requires_grad_(False)
    return unread
