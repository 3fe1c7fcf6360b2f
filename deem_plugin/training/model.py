"""Makes the model of a recipe: loaded or assembled, its tower mounted, frozen and given LoRA."""

from pathlib import Path

from torch import nn

from deem_plugin.files import naming_the_checkpoint
from deem_plugin.hub import at_revision
from deem_plugin.training.arguments import DeemArguments, ModelArguments
from deem_plugin.training.interleaved import load_deem
from deem_plugin.training.parts import find, freeze, freeze_names, matches, resolve


def make_model(arguments: ModelArguments, deem: DeemArguments | None = None):
    """
    Returns the VLM of a recipe, ready to train (a `PeftModel` with LoRA), and its processor.

    Args:
        arguments (`ModelArguments`): The section `model`, with `model` or `language_model` set.
        deem (`DeemArguments`, *optional*): The section `deem`, where the model is the interleaved one.

    Raises:
        ValueError: If a pattern matches nothing, or the chat template is missing.
    """
    model, processor = _load(arguments) if deem is None else load_deem(arguments, deem)
    use_chat_template(processor, arguments)
    if arguments.lora.r:
        model = add_lora(model, arguments)
    freeze(model, arguments.freeze)
    freeze_unread_layers(model, processor.image_processor)
    return model, processor


def use_chat_template(processor, arguments: ModelArguments):
    """
    Gives a processor the chat template of a recipe, or else its tokenizer's.

    Raises:
        ValueError: If it cannot render a conversation, before a training comes to the first.
    """
    from deem_plugin.data.chat import render_chat
    from deem_plugin.vision.processors import join_parts

    if arguments.chat_template is not None:
        template = Path(arguments.chat_template)
        if not template.is_file():
            raise ValueError(
                f"The chat template {template} does not exist. Set `model.chat_template` to a Jinja file, or leave it "
                f"out if the model brings one."
            )
        processor.chat_template = template.read_bytes().decode(errors="replace")
    elif processor.chat_template is None and processor.tokenizer.chat_template is not None:
        # A saved processor comes back with its tokenizer's template, so that one must take images, too.
        processor.chat_template = join_parts(processor.tokenizer.chat_template, processor.image_token)
    turns = (("user", "question"), ("assistant", "answer"))
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    try:
        rendered, problem = render_chat(processor, messages), "it leaves out what is said"
    except Exception as error:  # a template is a program
        rendered, problem = "", f"{type(error).__name__}: {error}"
    given = arguments.chat_template
    whole = processor.chat_template and all(text in rendered for _, text in turns)
    if not rendered or (given and not whole):
        raise ValueError(
            f"The chat template {given or f'of {arguments.source()[1]}'} cannot be used ({problem}). Set "
            f"`model.chat_template` to a Jinja file that renders `messages`."
        )


def _load(arguments: ModelArguments):
    """Loads the VLM, or assembles a LLaVA of a language model and a tower."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    import deem_plugin.vision.auto  # noqa: F401  # so that checkpoints with our tower load
    from deem_plugin.vision import assemble_llava, build_vision_tower

    with naming_the_checkpoint(*arguments.source()):
        if arguments.language_model is not None:
            source = AutoModelForCausalLM.from_pretrained(
                **at_revision(arguments.language_model), **arguments.loading()
            )
            tokenizer, template = AutoTokenizer.from_pretrained(**at_revision(arguments.language_model)), None
        else:
            source = AutoModelForImageTextToText.from_pretrained(**at_revision(arguments.model), **arguments.loading())
            processor = AutoProcessor.from_pretrained(**at_revision(arguments.model))
            if arguments.vision_tower is None:
                return source, processor
            tokenizer, template = processor.tokenizer, processor.chat_template
    tower = build_vision_tower(**arguments.tower(), pretrained=arguments.vision_pretrained)
    model, processor = assemble_llava(source, tokenizer, tower)
    processor.chat_template = template or processor.chat_template
    return model, processor


def add_lora(model, arguments: ModelArguments):
    """
    Puts LoRA on the linear layers of the parts that `lora.modules` names, and freezes the rest but `lora.full`.

    Raises:
        ValueError: If a pattern of `lora.modules` or `lora.full` matches nothing; lists the parts.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import PreTrainedModel

    for pattern in arguments.lora.modules:
        find(model, pattern, "model.lora.modules")
    patterns = [resolve(model, pattern) for pattern in arguments.lora.modules]
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
        and any(matches(pattern, name) for pattern in patterns)
    ]
    full = []
    for pattern in arguments.lora.full:
        find(model, pattern, "model.lora.full")
        pattern = resolve(model, pattern)
        full += [name for name, _ in model.named_modules() if name == pattern or name.endswith(f".{pattern}")]
    overlap = sorted(name for name in targets if any(name == part or name.startswith(f"{part}.") for part in full))
    if overlap:
        raise ValueError(
            f"`model.lora.full` trains in full what `model.lora.modules` puts LoRA on ({overlap[0]!r} and "
            f"{len(overlap) - 1} more). Name a part in one of them only."
        )
    config = LoraConfig(
        r=arguments.lora.r,
        lora_alpha=arguments.lora.alpha,
        lora_dropout=arguments.lora.dropout,
        target_modules=targets,
        modules_to_save=full or None,
    )
    return get_peft_model(model, config)


def freeze_unread_layers(model, image_processor=None) -> list[str]:
    """
    Freezes what the language model never reads of the tower, as its [`Eyes`] have measured it. Returns the names of
    these parameters, as seen from the tower.

    A LLaVA reads the second-last layer of its tower, so that the last one never gets a gradient. Left trainable, it
    makes DistributedDataParallel fail or, with gradient checkpointing, reduce wrong gradients silently.

    Args:
        model (`nn.Module`): The VLM, also behind PEFT.
        image_processor (*optional*): Makes the picture that it is measured on; by default one of the tower's size.
    """
    from deem_plugin.vision.eyes import Eyes
    from deem_plugin.vision.towers import find_tower, without_peft

    tower = find_tower(without_peft(model))
    trainable = {name for name, value in tower.named_parameters() if value.requires_grad}
    if not trainable:
        return []
    # Without an image processor, whatever the normalisation is, what is read is the same.
    statistics = {"mean": [0.0] * 3, "std": [1.0] * 3} if image_processor is None else {}
    unread = trainable - Eyes.of(model, image_processor, **statistics).read_parameters
    freeze_names(tower, unread)
    return sorted(unread)
