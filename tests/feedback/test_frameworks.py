"""What ms-swift, LLaMA-Factory and axolotl do to a model and its batches, by stand-ins: none of them is needed."""

import functools
import inspect
from types import MethodType

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import LlavaForConditionalGeneration

from deem_plugin.vision.towers import find_tower

from ..tiny import IMAGE_SIZE, tiny_llava
from .helpers import relative_difference, samples
from .runs import logged, make_trainer, run, undrawn_callback

EXACT = 1e-5
IMAGE_TOKENS = 16
# How each framework is told to train the tower, which all three leave frozen unless they are.
FLAGS = ["ms-swift: `--freeze_vit false`", "LLaMA-Factory: `freeze_vision_tower: false`", "axolotl: LoRA targets"]


def wrap_forward(module):
    """
    Puts a function around `forward` as ms-swift does for every vision tower: it wraps the bound method and is bound
    once more, so that the signature of the instance has lost its first argument.
    """
    forward = module.forward

    @functools.wraps(forward)
    def wrapped(self, *args, **kwargs):
        return forward(*args, **kwargs)

    module.forward = MethodType(wrapped, module)
    assert "pixel_values" not in inspect.signature(module.forward).parameters


def lora_on(model, part):
    """Puts LoRA on the attention of the `vision_tower` or of the `language_model`."""
    return get_peft_model(model, LoraConfig(r=2, target_modules=rf".*{part}.*\.[qv]_proj", init_lora_weights=False))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_a_wrapped_forward_is_read_as_the_tower_itself(tmp_path, checkpointing):
    (expected,) = run(tmp_path, undrawn_callback(), gradient_checkpointing=checkpointing)[1]
    model, _ = tiny_llava()
    wrap_forward(find_tower(model))

    trainer, (gradients,) = run(tmp_path, undrawn_callback(), model=model, gradient_checkpointing=checkpointing)

    assert relative_difference(expected, gradients) < EXACT
    assert relative_difference(expected, gradients, "feedback_conditioner") < EXACT
    assert len(logged(trainer, "feedback_loss")) == 1


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_with_the_tokenizer_alone_the_image_processor_is_found_in_the_models_folder(tmp_path, lora):
    _, processor = tiny_llava(tmp_path / "model")
    rows = samples(processor)

    def loaded():
        model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model")
        torch.manual_seed(5)
        return lora_on(model, "vision_tower") if lora else model

    (expected,) = run(tmp_path, undrawn_callback(), model=loaded(), rows=rows)[1]
    settings = {"model": loaded(), "rows": rows, "processor": processor.tokenizer}
    trainer, (gradients,) = run(tmp_path, undrawn_callback(), **settings)

    assert trainer.processing_class is processor.tokenizer
    assert relative_difference(expected, gradients) < EXACT


@pytest.mark.parametrize("saved", [False, True], ids=["no folder", "a folder without image processor"])
def test_with_the_tokenizer_alone_and_no_image_processor_the_error_says_what_to_do(tmp_path, saved):
    model, processor = tiny_llava()
    if saved:
        model.save_pretrained(tmp_path / "model")
        model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model")

    with pytest.raises(
        ValueError, match="image_mean.*`processing_class=processor`.*`image_std` of the FeedbackConfig"
    ):
        make_trainer(tmp_path, undrawn_callback(), model=model, processor=processor.tokenizer, rows=[])


def test_with_the_tokenizer_alone_mean_and_std_may_be_given(tmp_path):
    _, processor = tiny_llava()
    rows = samples(processor)
    statistics = {f"image_{name}": getattr(processor.image_processor, f"image_{name}") for name in ("mean", "std")}
    (expected,) = run(tmp_path, undrawn_callback())[1]

    callback = undrawn_callback(**statistics)
    (gradients,) = run(tmp_path, callback, rows=rows, processor=processor.tokenizer)[1]

    assert relative_difference(expected, gradients) < EXACT


def with_picture(rows, pixels, image_token):
    """
    Collates rows of text as LLaMA-Factory does, which wants a picture in each batch: it stands behind the first text,
    where nothing looks at it and nothing is learned.
    """
    count = len(rows)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    behind = {name: torch.full((count, IMAGE_TOKENS), value) for name, value in FILLING.items()}
    behind["input_ids"][0] = image_token
    batch = {name: torch.cat([batch[name], behind[name]], dim=1) for name in behind}
    return {**batch, "pixel_values": pixels}


FILLING = {"input_ids": 0, "attention_mask": 0, "labels": -100}


def white(processor):
    """The picture of LLaMA-Factory, as the image processor gives it."""
    picture = Image.new("RGB", (64, 64), (255, 255, 255))
    return processor.image_processor(images=[picture], return_tensors="pt")["pixel_values"]


def zeros(processor):
    """The picture of ms-swift, normalised already."""
    return torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)


@pytest.mark.parametrize("picture", [white, zeros])
def test_a_picture_that_stands_in_for_none_gets_no_feedback_and_is_counted(tmp_path, picture):
    _, processor = tiny_llava()
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")

    def collated(rows):
        return with_picture(rows, picture(processor), image_token)

    settings = {"rows": samples(processor, with_images=False), "data_collator": collated}
    (plain,) = run(tmp_path, **settings)[1]
    trainer, (gradients,) = run(tmp_path, undrawn_callback(), **settings)

    of_feedback = [g for name, g in gradients.items() if "vision_tower" in name or "feedback_conditioner" in name]
    assert of_feedback and not any(gradient.any() for gradient in of_feedback)
    assert relative_difference(plain, {name: gradients[name] for name in plain}) == 0
    assert logged(trainer, "feedback_blank") == [1] and not logged(trainer, "feedback_loss")


def test_a_picture_of_noise_in_its_place_does_get_feedback(tmp_path):
    """So that the test above can fail."""
    _, processor = tiny_llava()
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    noise = samples(processor, 1)[0]["pixel_values"][None]

    trainer, (gradients,) = run(
        tmp_path,
        undrawn_callback(),
        rows=samples(processor, with_images=False),
        data_collator=lambda rows: with_picture(rows, noise, image_token),
    )

    assert any(gradient.any() for name, gradient in gradients.items() if "vision_tower" in name)
    assert logged(trainer, "feedback_loss") and not logged(trainer, "feedback_blank")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA on the language model"])
def test_the_error_of_a_frozen_tower_names_the_flags_of_the_frameworks(lora):
    model, processor = tiny_llava()
    if lora:
        model = lora_on(model, "language_model")
    else:
        find_tower(model).requires_grad_(False)

    with pytest.raises(ValueError, match="is frozen") as error:
        undrawn_callback().attach(model, processor)

    for flag in FLAGS:
        assert flag in str(error.value)
