"""What the feedback must be to every vision-language family of transformers: the right pictures, tokens, gradients."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from deem_plugin.vision.eyes import Eyes
from deem_plugin.vision.outputs import mapped, tokens_last

from ..feedback.helpers import begin_step, keyed_callback, relative_difference
from .builders import FAMILIES, POPULAR, build
from .generic import small_config
from .outcomes import BROKEN, REFUSED, UNBUILT, WITHOUT_TOWER

TRAINED = [name for name in FAMILIES if name not in {**REFUSED, **BROKEN}]
CASES = [name if name in POPULAR else pytest.param(name, marks=pytest.mark.slow) for name in TRAINED]
WEIGHT = 100.0


@cache
def measured(name):
    """The tiny model of a family, its batch, and its eyes."""
    case = build(name)
    return case, Eyes.of(case.model, case.image_processor)


def views_of_calls(case, eyes, **options):
    """The loss of a batch, the views of each call of the tower, and every tensor of its outputs, by path."""
    calls, tensors, inputs = [], {}, {}

    def note(module, args, kwargs, output):
        def keep(path, tensor):
            if tensor.is_floating_point() and tensor.requires_grad:
                own = tensor.clone()
                own.retain_grad()
                tensors.setdefault(path, []).append(own)
                return own
            return tensor

        output = mapped(output, keep)
        calls.append(eyes.views(eyes.call_arguments(args, kwargs), output, inputs))
        return output

    handles = [
        case.model.register_forward_pre_hook(lambda m, args, kwargs: inputs.update(kwargs), with_kwargs=True),
        eyes.tower.register_forward_hook(note, with_kwargs=True),
    ]
    loss = case.model(**case.batch, **options).loss
    for handle in handles:
        handle.remove()
    return loss, calls, tensors


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_when_the_feedback_is_attached(name):
    case = build(name)
    with pytest.raises(ValueError, match=REFUSED[name][0]):
        keyed_callback().attach(case.model, case.image_processor)


VQ = {
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "embed_dim": 8,
    "num_embeddings": 16,
    "latent_channels": 8,
}


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("fuyu", {}, "Found no vision tower"),
        ("gemma4_unified", {}, "Found no vision tower"),
        ("mistral4", {}, "Found no vision tower"),
        ("udop", {}, "Found no vision tower"),
        ("chameleon", {"vocabulary_map": {"<image>": 500}, "vq_config": VQ}, "Found no vision tower"),
        ("emu3", {"vocabulary_map": {"<image>": 500}, "vq_config": VQ}, "could not be measured"),
        ("instructblipvideo", {}, "could not be measured"),
        ("pi0", {}, "could not be measured"),
    ],
)
def test_what_sees_without_a_tower_or_no_pictures_is_refused(name, options, reason):
    with torch.device("meta"):  # some of these cannot be made small
        model = AutoModelForImageTextToText.from_config(small_config(name, **options))
    with pytest.raises(ValueError, match=reason):
        Eyes.of(model, None, [0.5] * 3, [0.5] * 3)


@pytest.mark.parametrize("name", BROKEN)
def test_what_transformers_cannot_run_is_still_broken(name):
    """Fails once it is mended; the family then belongs to those that keep the contract."""
    case = build(name)
    with pytest.raises(AttributeError, match=BROKEN[name]):
        case.model(**case.batch)


@pytest.mark.parametrize("name", CASES)
def test_pictures_are_the_source_and_tokens_those_that_the_language_model_reads(name):
    case, eyes = measured(name)
    case.model.zero_grad()
    loss, calls, tensors = views_of_calls(case, eyes)
    loss.backward()
    views = [view for call in calls for view in call]

    if case.sources:
        assert len(views) == len(case.sources)
        for view, source in zip(views, case.sources, strict=True):
            assert (view.picture - source).abs().max() <= 1e-6
    assert all(view.picture.min() > -0.01 and view.picture.max() < 1.01 for view in views)
    assert len({view.image for view in views}) == 2
    # Each tensor that the language model has gradient on is read, row by row, and no other.
    read = {path for path, own in tensors.items() if all(t.grad is not None and t.grad.any() for t in own)}
    assert read == set(eyes.reading.paths)
    for path in eyes.reading.paths:
        gradient = tokens_last(tensors[path][0].grad)
        if eyes.layout.fixed_rows and gradient.dim() > 2:
            rows = (gradient != 0).any(-1).flatten(0, -2)
            chosen = torch.zeros(rows.shape[-1], dtype=torch.bool)
            chosen[eyes.reading.rows if eyes.reading.rows is not None else slice(eyes.reading.first, None)] = True
            assert not rows[:, ~chosen].any()


@pytest.mark.parametrize("name", CASES)
def test_the_tokens_of_a_view_depend_on_its_own_picture(name):
    case, eyes = measured(name)
    pixels = next(key for key in case.batch if key.startswith("pixel_values"))
    batch = {**case.batch, pixels: case.batch[pixels].clone().requires_grad_()}
    whole, calls, _ = views_of_calls(type(case)(case.model, case.image_processor, batch), eyes)
    views = calls[0]
    images = sorted({view.image for view in views})
    for image in images:
        tokens = torch.cat([view.tokens.flatten() for view in views if view.image == image])
        (gradient,) = torch.autograd.grad(tokens.square().sum(), batch[pixels], retain_graph=True)
        # The rows of the first picture come first in every layout.
        own = _share_of_first(gradient, case, eyes, views, images[0])
        assert own > 0.99 if image == images[0] else own < 0.01


def _share_of_first(gradient, case, eyes, views, first):
    """How much of a gradient at the pixels lies in the first picture."""
    mass = gradient.abs()
    grids = next((case.batch[name] for name in ("image_grid_thw", "image_grid_hw") if name in case.batch), None)
    if grids is not None:
        counts = grids.prod(dim=1)
        mass = mass.reshape(int(counts.sum()), -1)
        return (mass[: counts[0]].sum() / mass.sum()).item()
    if "target_sizes" in case.batch:
        width = case.batch["target_sizes"][0].prod() * mass.shape[2]
        return (mass[..., :width].sum() / mass.sum()).item()
    if len(mass) == 2:
        return (mass[0].sum() / mass.sum()).item()
    count = sum(view.image == first for view in views)
    return (mass[:count].sum() / mass.sum()).item()


def gradients(model, loss):
    """The gradients of a loss, by name."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_the_sum_of_both_losses(name):
    case, _ = measured(name)
    callback = keyed_callback()
    callback.attach(case.model, case.image_processor)
    try:
        eyes = callback.hook.source.eyes
        begin_step(callback, scale=WEIGHT)
        both = gradients(case.model, case.model(**case.batch).loss)
        callback.hook.check_injected()
        begin_step(callback, scale=0.0)
        loss, calls, _ = views_of_calls(case, eyes)
        generator = torch.Generator().manual_seed(0)
        feedback = [callback.hook.loss(views, callback.conditioner, generator) for views in calls]
        by_hand = gradients(case.model, loss + WEIGHT * sum(losses.total for losses in feedback))
        alone = gradients(case.model, case.model(**case.batch).loss)
    finally:
        callback.detach()

    assert relative_difference(by_hand, both) < 1e-5
    # It reaches the first layer of the tower: the embedding of the patches.
    tower = {id(parameter) for parameter in eyes.tower.parameters()}
    names = [name for name, parameter in case.model.named_parameters() if id(parameter) in tower and name in alone]
    first = next((name for name in names if "patch" in name), names[0])
    assert relative_difference({first: alone[first]}, {first: both[first]}) > 1e-8
    # Every picture counts once, in how many calls and tiles it may come.
    assert all(losses.counted.all() for losses in feedback)
    assert sum(losses.images.item() for losses in feedback) == pytest.approx(2)


def trains(case):
    """Whether the model by itself has gradients."""
    try:
        case.model(**case.batch, use_cache=False).loss.backward()
    except RuntimeError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_gradient_checkpointing_changes_nothing(name):
    case, _ = measured(name)
    if not case.model.supports_gradient_checkpointing:
        pytest.skip("the family has none")
    results = []
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        own = replace(case, model=copy.deepcopy(case.model).train())
        if options is not None:
            own.model.gradient_checkpointing_enable(options)
            own.model.enable_input_require_grads()
            if not trains(own):  # as Mistral Large 4 with reentrant checkpointing, with and without feedback
                continue
        callback = keyed_callback()
        callback.attach(own.model, own.image_processor)
        begin_step(callback, scale=WEIGHT)
        loss = own.model(**own.batch, **({} if options is None else {"use_cache": False})).loss
        results.append(gradients(own.model, loss))
    assert len(results) > 1
    for result in results[1:]:
        assert relative_difference(results[0], {name: result[name] for name in results[0]}) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_feedback_reaches_lora_in_the_tower(name):
    case, eyes = measured(name)
    layers = {module for module in eyes.tower.modules() if type(module) is torch.nn.Linear}
    # Of a model of its own: PEFT changes the one that it is given.
    model = copy.deepcopy(case.model)
    targets = [own for own, module in case.model.named_modules() if module in layers]
    if not targets:
        pytest.skip("a tower of convolutions, which this configuration of LoRA leaves alone")
    try:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    except NotImplementedError as error:
        pytest.skip(f"PEFT cannot wrap it: {error}")
    callback = keyed_callback()
    callback.attach(model, case.image_processor)
    begin_step(callback, scale=WEIGHT)
    both = gradients(model, model(**case.batch).loss)
    callback.hook.check_injected()
    begin_step(callback, scale=0.0)
    alone = gradients(model, model(**case.batch).loss)

    # PEFT puts LoRA on some language models' experts unasked.
    names = [own for own in alone if "lora_" in own and any(f".{target}." in own for target in targets)]
    changed = [own for own in names if relative_difference({own: alone[own]}, {own: both[own]}) > 1e-8]
    assert names and len(changed) >= 0.9 * len(names)


def test_every_class_of_transformers_has_been_looked_at():
    """A new release of transformers shows up here: build its classes, or say why they cannot be."""
    known = {**FAMILIES, **UNBUILT, **WITHOUT_TOWER}
    assert sorted(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - set(known)) == []


def test_nine_classes_in_ten_with_a_tower_train():
    names = [name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if name not in WITHOUT_TOWER]
    assert sum(name in TRAINED for name in names) >= 0.9 * len(names)
