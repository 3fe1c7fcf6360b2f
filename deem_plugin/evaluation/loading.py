"""Loads a vision-language model to be evaluated: a Hugging Face checkpoint, or a peft adapter on one."""

from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from deem_plugin.files import naming_the_checkpoint
from deem_plugin.hub import at_revision, split_revision

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_vlm(pretrained: str, dtype: str = "auto", device: str | torch.device = "cpu"):
    """
    Loads a model and its processor, ready for inference.

    Args:
        pretrained (`str`): Folder or hub id of a checkpoint, or folder of a peft adapter (with `adapter_config.json`).
        dtype (`str`): A key of `DTYPES`; "auto" keeps the checkpoint's own.
        device (`str` or `torch.device`): Where the model goes.

    Returns:
        `tuple`: The model in eval mode, and its processor.

    Raises:
        ValueError: If the checkpoint is missing, has no processor, or lacks weights that would then be random.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}.")
    import deem_plugin.models  # noqa: F401  # registers our model and tower with the Auto classes

    pretrained = local_or_hub(pretrained)
    is_adapter = (Path(pretrained) / "adapter_config.json").is_file()
    base = base_of_adapter(pretrained) if is_adapter else pretrained
    with naming_the_checkpoint("checkpoint", base):
        model, report = AutoModelForImageTextToText.from_pretrained(
            **at_revision(base), dtype=DTYPES[dtype], output_loading_info=True
        )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{base} lacks {len(missing)} weights of {type(model).__name__}, among them {', '.join(missing[:3])}. "
            f"They would be random, so its scores would mean nothing. Save the whole model with `save_pretrained`."
        )
    if is_adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, pretrained)
    return model.to(device).eval(), _load_processor(pretrained, base)


def local_or_hub(pretrained: str) -> str:
    """Returns a checkpoint's folder or hub id; raises for a folder that is missing or holds no model."""
    path = Path(pretrained).expanduser()
    if path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            inside = sorted(child.name for child in path.iterdir() if (child / "config.json").is_file())
            raise ValueError(
                f"{pretrained} holds neither config.json nor adapter_config.json, so it is no checkpoint. "
                + (f"Checkpoints in it: {', '.join(inside)}." if inside else "Give the folder that training wrote.")
            )
    elif path.is_absolute() or pretrained.startswith((".", "~")) or split_revision(pretrained)[0].count("/") > 1:
        raise ValueError(f"No such checkpoint folder: {pretrained}. Give the folder that training wrote, or a hub id.")
    return str(path) if path.is_dir() else pretrained


def base_of_adapter(pretrained: str) -> str:
    """Returns the checkpoint that a peft adapter belongs to; raises `ValueError` if it names none that there is."""
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(pretrained).base_model_name_or_path
    if not base:
        raise ValueError(
            f"The adapter {pretrained} does not say on which model it was trained: set `base_model_name_or_path` in "
            f"its adapter_config.json."
        )
    return local_or_hub(base)


def _load_processor(*places: str):
    """Returns the first processor with a tokenizer and an image processor among the places."""
    problem = "there is only a tokenizer or only an image processor"
    for place in places:
        try:
            processor = AutoProcessor.from_pretrained(**at_revision(place))
        except (OSError, ValueError) as error:
            problem = str(error).splitlines()[0]
            continue
        if hasattr(processor, "tokenizer") and hasattr(processor, "image_processor"):
            return processor
    raise ValueError(
        f"No processor found in {' or '.join(dict.fromkeys(places))} ({problem}). Save it beside the model with "
        f"`processor.save_pretrained(folder)`."
    )
