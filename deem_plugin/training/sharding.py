"""What FSDP asks of a run: layers that it can find, and the same collectives on every rank."""

import os

from accelerate.utils import parse_flag_from_env
from PIL import Image

from deem_plugin.data.collator import IGNORE_INDEX, ConversationCollator

# Enough for the smallest picture that a processor takes.
_SIDE = 64


def uses_fsdp(args) -> bool:
    """Tells whether a run shards its model by FSDP, by its arguments or by those of `accelerate launch`."""
    return bool(args.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")


def name_sharded_layers(model, args):
    """
    Tells FSDP the classes of layers to shard one by one: those of `_no_split_modules` that the model has.

    By itself accelerate takes the whole list and fails on what is not there; transformers' holds the layers of all
    models in a tower's module, such as CLIP's text embeddings in a LLaVA (seen with transformers 5.24).
    """
    present = {type(module).__name__ for module in model.modules()}
    names = ",".join(sorted(present & set(getattr(model, "_no_split_modules", None) or ())))
    if args.fsdp_plugin_args:
        args.fsdp_plugin_args.setdefault("transformer_cls_names_to_wrap", names)
    else:  # of `accelerate launch`, which hands its configuration on by the environment
        os.environ.setdefault("FSDP_TRANSFORMER_CLS_TO_WRAP", names)


class PictureInEachBatch:
    """
    Adds a conversation about a blank picture to batches of text alone; nothing is learned of it.

    A rank whose batch has no picture does not call the tower, and waits for ever for the ranks that do: each of the
    tower's layers is gathered by all of them. The callback gives a blank picture no feedback and counts it.

    Args:
        collate (`ConversationCollator`): Makes the batches.
    """

    def __init__(self, collate: ConversationCollator):
        self.collate = collate

    def __call__(self, examples):
        if any(example.get("images") for example in examples):
            return self.collate(examples)
        messages = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "."}]
        blank = {"messages": messages, "images": [Image.new("RGB", (_SIDE, _SIDE), "white")]}
        batch = self.collate([*examples, blank])
        batch["labels"][0] = IGNORE_INDEX  # the collator puts an example with pictures first
        return batch
