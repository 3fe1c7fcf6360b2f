"""The feedback reaches DEEM's own tower in a LLaVA; stock towers are in `tests/families`."""

from transformers import AutoModelForImageTextToText

from deem_plugin.vision import find_tower

from ..vision.test_llava import IMAGE, llava_of_parts, prompt
from ..vision.towers import tiny_tower
from .helpers import begin_step, keyed_callback, relative_difference, total_loss

NORMALIZATION = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
# Large, so that the feedback is a fair share of the gradients that are compared.
WEIGHT = 5000.0


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_the_gradient_is_that_of_the_sum_of_both_losses(tmp_path):
    tower = tiny_tower("convnext")
    model, _ = llava_of_parts(tower, tmp_path)
    inputs = prompt(tower)
    inputs["pixel_values"] = inputs["pixel_values"].sigmoid() * 2 - 1  # a picture, normalised
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    model.train()
    callback = keyed_callback(**NORMALIZATION)
    callback.attach(model)
    begin_step(callback, scale=WEIGHT)
    both = gradients(model, model(**inputs).loss)
    callback.hook.check_injected()

    # By hand, on the tower's own output.
    begin_step(callback, scale=0.0)
    views, model_inputs = [], {}
    eyes = callback.hook.source.eyes

    def take(tower, args, kwargs, output):
        views.extend(eyes.views(eyes.call_arguments(args, kwargs), output, model_inputs))

    handles = [
        model.register_forward_pre_hook(lambda module, args, kwargs: model_inputs.update(kwargs), with_kwargs=True),
        find_tower(model).register_forward_hook(take, with_kwargs=True),
    ]
    lm_loss = model(**inputs).loss
    for handle in handles:
        handle.remove()
    by_hand = gradients(model, lm_loss + WEIGHT * total_loss(callback, views))
    lm_only = gradients(model, model(**inputs).loss)

    assert relative_difference(by_hand, both) < 1e-5
    tower = {name: value for name, value in both.items() if name in lm_only and "vision_tower" in name}
    assert relative_difference({name: lm_only[name] for name in tower}, tower) > 0.01

    callback.detach()
    model.save_pretrained(tmp_path / "llava")
    _, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "llava", output_loading_info=True)
    assert not any(info.values())
