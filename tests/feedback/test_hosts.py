"""The feedback reaches the tower of every kind of vision-language model, with its own tower and with DEEM's."""

import pytest
from transformers import AutoModelForImageTextToText, LlavaNextImageProcessor

from deem_plugin.vision import HOSTS, find_tower, mount_tower

from ..vision.test_hosts import IMAGE, make_host, prompt
from ..vision.towers import tiny_tower
from .helpers import begin_step, keyed_callback, relative_difference, total_loss

NORMALIZATION = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
# Large, so that the feedback is a fair share of the gradients that are compared.
WEIGHT = 5000.0


def host_and_inputs(model_type, with_deem_tower):
    """Makes a host with its own tower or DEEM's, and a batch of one sample with its labels."""
    model = make_host(model_type)
    tower = tiny_tower("convnext", class_token=model_type != "cohere2_vision")
    if with_deem_tower:
        model, _ = mount_tower(model, tower)
        inputs = prompt(model_type, tower)
    else:
        own = find_tower(model).config
        # Stands for the tower's shape: what `prompt` counts image tokens by.
        stand_in = tiny_tower("clip" if own.model_type.startswith("clip") else "siglip", class_token=False)
        stand_in.config.image_size = own.image_size
        side = own.image_size // own.patch_size
        inputs = prompt(model_type, stand_in, tokens=side**2)
    if model_type == "paligemma":
        inputs["token_type_ids"] = (inputs["input_ids"] == 12).long()
    inputs["pixel_values"] = inputs["pixel_values"].sigmoid() * 2 - 1  # a picture, normalised
    return model.train(), inputs | {"labels": inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)}


def image_processor_of(model):
    """The image processor of a model that cuts pictures into tiles; others need none to be measured."""
    pinpoints = getattr(model.config, "image_grid_pinpoints", None)
    if pinpoints is None:
        return None
    size = model.config.vision_config.image_size
    return LlavaNextImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_grid_pinpoints=pinpoints
    )


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("with_deem_tower", [False, True], ids=["own tower", "DEEM's tower"])
@pytest.mark.parametrize("model_type", HOSTS)
def test_the_gradient_is_that_of_the_sum_of_both_losses(model_type, with_deem_tower, tmp_path):
    model, inputs = host_and_inputs(model_type, with_deem_tower)
    callback = keyed_callback(**NORMALIZATION)
    callback.attach(model, image_processor_of(model))
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
    model.save_pretrained(tmp_path)
    _, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
