"""The UNet's synchroniser, against the official MMFS (fixture F2) and by what it must and must not change."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import interpolate
from torch.utils.checkpoint import checkpoint

from deem_plugin.feedback import Conditioner, DiffusionFeedback
from deem_plugin.feedback.synchroniser import UNetSynchroniser, skip_features
from deem_plugin.models.official import convert_names
from deem_plugin.vision import DeemVisionConfig, DeemVisionTower
from deem_plugin.vision.grids import sincos_position_embedding

from ..parity_weights import parity_generator, parity_settings, parity_tower_config, part, tower_weights
from ..tiny import tiny_unet

VALUES = {"atol": 1e-5, "rtol": 1e-5}
GRADIENTS = 1e-4  # relative
WIDTH = 12


@pytest.fixture(scope="module")
def settings(shared_dir):
    return parity_settings(shared_dir)


@pytest.fixture(scope="module")
def weights(shared_dir):
    """Everything at its start, where MMFS has no effect."""
    return load_file(shared_dir / "parity/f2_weights.safetensors")


@pytest.fixture(scope="module")
def trained_weights(weights, shared_dir):
    """With the zero convolutions of MMFS drawn at random."""
    return weights | load_file(shared_dir / "parity/f2_mmfs_weights.safetensors")


@pytest.fixture(scope="module")
def case(shared_dir):
    return load_file(shared_dir / "parity/f2_partial_mmfs_random.safetensors")


@pytest.fixture(scope="module")
def diffusion_model(shared_dir, weights):
    return parity_generator(shared_dir, weights)


def _converted(weights):
    """Fixture F2 is the visual tokenizer alone, so its names lack the prefix that they have in the whole model."""
    return convert_names({f"visual_tokenizer.{name}": value for name, value in weights.items() if "mmfs" in name})


def _official_synchroniser(unet, weights):
    synchroniser = UNetSynchroniser(unet.config, feature_dim=64, inner_dim=32, num_heads=4)
    converted = _converted(weights)
    synchroniser.load_state_dict(part(converted.weights, "denoising.unet_synchroniser."), strict=True)
    return synchroniser


def _relative(ours, expected):
    return (ours - expected).norm() / expected.norm()


def test_each_residual_and_the_prediction_are_the_official_ones(diffusion_model, trained_weights, case):
    unet = diffusion_model.denoiser.model
    synchroniser = _official_synchroniser(unet, trained_weights)
    added = {}
    for index, block in enumerate(synchroniser.skip_blocks):
        block.register_forward_hook(lambda module, args, output, index=index: added.update({index: output}))
    synchroniser.middle_block.register_forward_hook(
        lambda module, args, output: added.update({"middle": (args[0], args[0] + output)})
    )

    with (
        torch.no_grad(),
        synchroniser.attached(unet, [case[f"mmfs_features.{i}"] for i in range(4)], case["mmfs_mask"]),
    ):
        prediction = unet(case["noisy_latents"], case["timesteps_mapped"], case["dif_embed"]).sample

    for index in range(12):
        torch.testing.assert_close(added[index], case[f"mmfs.down_delta.{index}"], **VALUES)
    torch.testing.assert_close(added["middle"][0], case["mmfs.mid_in"], **VALUES)
    torch.testing.assert_close(added["middle"][1], case["mmfs.mid_out"], **VALUES)
    torch.testing.assert_close(prediction, case["unet_pred"], **VALUES)


def _official_region(mask, size):
    return (interpolate(mask, size=size, mode="bilinear") > 0).float()


def _region_loss(diffusion_model, synchroniser, trained_weights, case, shared_dir):
    """The whole path of the masked case, with the official bilinear masks, from pixels to loss."""
    tower = DeemVisionTower(DeemVisionConfig(**parity_tower_config())).eval()
    tower.load_state_dict(tower_weights(trained_weights), strict=True)
    conditioner = Conditioner(32, 64)
    conditioner.head.load_state_dict(part(trained_weights, "proj_i."))
    full = load_file(shared_dir / "parity/f2_full.safetensors")
    mask = case["input.image_mask"]

    encoded = tower.encoder(full["image_normalised"])
    queries = tower._resample(encoded, _official_region(mask, (4, 4)).flatten(2).transpose(1, 2))
    context = conditioner(queries)
    maps = []
    for level in encoded.maps.values():
        size = level.shape[-2:]
        positions = sincos_position_embedding(64, *size).T.unflatten(1, size)
        maps.append(((level + positions) * _official_region(mask, size))[:, None])
    context.retain_grad()
    queries.retain_grad()
    with synchroniser.attached(diffusion_model.denoiser.model, maps, torch.ones(2, 1)):
        loss = DiffusionFeedback(diffusion_model.denoiser)(
            case["latents"],
            context,
            mask=_official_region(mask, (16, 16)),
            timesteps=case["timesteps_mapped"],
            noise=case["draw.noise"],
        )
    return loss.mean(), maps, {"grad.dif_embed": context, "grad.perceiver_out": queries}, tower, conditioner


def test_the_loss_with_maps_and_its_gradients_are_the_official_ones(
    diffusion_model, trained_weights, case, shared_dir
):
    synchroniser = _official_synchroniser(diffusion_model.denoiser.model, trained_weights)

    loss, maps, inner, tower, conditioner = _region_loss(
        diffusion_model, synchroniser, trained_weights, case, shared_dir
    )
    loss.backward()

    for index, level in enumerate(maps):
        torch.testing.assert_close(level, case[f"mmfs_features.{index}"], **VALUES)
    torch.testing.assert_close(loss, case["loss_sniffer"].squeeze(), **VALUES)
    ours = {name: tensor.grad for name, tensor in inner.items()} | {
        "grad.param.proj_i.weight": conditioner.head.weight.grad,
        "grad.param.perceiver_resampler.queries": tower.resampler.queries.grad,
        "grad.param.sniffer.vision_model.adapter_c2.weight": tower.encoder.adapters["0"].weight.grad,
        "grad.param.sniffer.vision_model.adapter_c4.weight": tower.encoder.adapters["2"].weight.grad,
        "grad.param.sniffer.vision_model.adapter_cls.weight": tower.encoder.class_adapter.weight.grad,
        "grad.param.sniffer.vision_model.visual.trunk.stem.0.weight": tower.encoder.trunk.stem[0].weight.grad,
    }
    for name, gradient in ours.items():
        assert _relative(gradient, case[name]) < GRADIENTS, name
    assert all(p.grad is None for p in diffusion_model.denoiser.model.parameters())

    norms = json.loads((shared_dir / "parity/f2_summary.json").read_text())["cases"]["partial_mmfs_random"][
        "grad_norms"
    ]
    parameters = dict(synchroniser.named_parameters())
    for theirs, name in _converted(trained_weights).renamed.items():
        expected = norms[theirs.removeprefix("visual_tokenizer.")]
        gradient = parameters[name.removeprefix("denoising.unet_synchroniser.")].grad
        assert gradient.norm() == pytest.approx(expected, rel=1e-3, abs=1e-7), theirs


def test_at_the_start_the_prediction_is_the_plain_one_and_the_last_layers_alone_learn(
    diffusion_model, weights, shared_dir
):
    unet = diffusion_model.denoiser.model
    synchroniser = _official_synchroniser(unet, weights)
    full = load_file(shared_dir / "parity/f2_full.safetensors")
    norms = json.loads((shared_dir / "parity/f2_summary.json").read_text())["cases"]["full"]["grad_norms"]
    maps = [full[f"multiscale_features.{i}"][:, None] for i in range(4)]
    inputs = (full["noisy_latents"], full["timesteps_mapped"], full["dif_embed"])

    plain = unet(*inputs).sample
    with synchroniser.attached(unet, maps, torch.ones(2, 1)):
        prediction = unet(*inputs).sample
    (prediction - full["draw.noise"]).square().mean().backward()

    assert torch.equal(prediction, plain)
    parameters = dict(synchroniser.named_parameters())
    for theirs, name in _converted(weights).renamed.items():
        expected = norms[theirs.removeprefix("visual_tokenizer.")]
        assert (expected > 0) == (".zero." in name)
        gradient = parameters[name.removeprefix("denoising.unet_synchroniser.")].grad
        assert gradient.norm() == pytest.approx(expected, rel=1e-3, abs=1e-7), theirs


def tiny_synchroniser(unet, seed=0, **options):
    """Makes a synchroniser for two maps an image of width 12; its last layers are no longer zero."""
    torch.manual_seed(seed)
    options = {"inner_dim": 16, "num_heads": 4, "num_levels": 2, "num_points": 3} | options
    synchroniser = UNetSynchroniser(unet.config, WIDTH, **options)
    for block in [*synchroniser.skip_blocks, synchroniser.middle_block]:
        torch.nn.init.normal_(block.zero.weight, std=0.3)
    return synchroniser


def tiny_maps(images=1, sizes=((8, 8), (4, 4)), batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, images, WIDTH, *size, generator=generator) for size in sizes]


def _predict(unet, synchroniser, maps, mask, size=(16, 16)):
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 4, *size, generator=generator)
    context = torch.randn(2, 5, 16, generator=generator)
    with synchroniser.attached(unet, maps, mask):
        return unet(latents, torch.tensor([10, 700]), context).sample


def test_a_new_synchroniser_changes_nothing():
    unet = tiny_unet()
    synchroniser = UNetSynchroniser(unet.config, WIDTH, inner_dim=16, num_heads=4, num_levels=2)
    latents, context = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 16)

    plain = unet(latents, 3, context).sample
    with synchroniser.attached(unet, tiny_maps(), torch.ones(2, 1)):
        assert torch.equal(unet(latents, 3, context).sample, plain)


def test_the_unet_is_left_as_it_was_found_even_after_an_error():
    unet = tiny_unet()
    synchroniser = tiny_synchroniser(unet)
    latents, context = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 16)
    plain = unet(latents, 3, context).sample

    with pytest.raises(RuntimeError), synchroniser.attached(unet, tiny_maps(), torch.ones(2, 1)):
        unet(latents, 3, context[..., :7])

    assert torch.equal(unet(latents, 3, context).sample, plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


def test_gradients_reach_every_map_and_every_parameter_but_not_the_unet():
    unet = tiny_unet().requires_grad_(False)
    synchroniser = tiny_synchroniser(unet)
    maps = [level.requires_grad_() for level in tiny_maps()]

    _predict(unet, synchroniser, maps, torch.ones(2, 1)).square().mean().backward()

    assert all(level.grad.abs().sum() > 0 for level in maps)
    assert all(parameter.grad.any() for parameter in synchroniser.parameters())
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_a_masked_image_has_no_influence():
    unet = tiny_unet()
    synchroniser = tiny_synchroniser(unet)
    mask = torch.tensor([[1, 0], [0, 1]])
    maps, others = tiny_maps(images=2), tiny_maps(images=2, seed=9)
    mixed = [
        torch.where(mask[..., None, None, None] != 0, level, other) for level, other in zip(maps, others, strict=True)
    ]
    seen = [level.requires_grad_() for level in maps]

    prediction = _predict(unet, synchroniser, seen, mask)
    prediction.sum().backward()

    torch.testing.assert_close(_predict(unet, synchroniser, mixed, mask), prediction)
    assert all(not level.grad[mask == 0].any() for level in seen)
    # Who sees nothing sees it finitely, and the same whatever is hidden.
    nothing = _predict(unet, synchroniser, maps, torch.zeros(2, 2))
    assert nothing.isfinite().all()
    torch.testing.assert_close(_predict(unet, synchroniser, others, torch.zeros(2, 2)), nothing)


def test_the_order_of_images_counts():
    unet = tiny_unet()
    synchroniser = tiny_synchroniser(unet)
    maps = tiny_maps(images=2)

    prediction = _predict(unet, synchroniser, maps, torch.ones(2, 2))
    swapped = _predict(unet, synchroniser, [level.flip(1) for level in maps], torch.ones(2, 2))

    assert not torch.allclose(prediction, swapped, atol=1e-4)


@pytest.mark.parametrize(("size", "maps"), [((16, 16), ((9, 5), (5, 3))), ((10, 14), ((7, 7), (4, 4)))])
def test_awkward_sizes_work(size, maps):
    unet = tiny_unet()
    synchroniser = tiny_synchroniser(unet, max_images=4)

    prediction = _predict(unet, synchroniser, tiny_maps(3, maps), torch.ones(2, 3), size)

    assert prediction.shape == (2, 4, *size)
    assert prediction.isfinite().all()


def test_checkpointing_its_blocks_changes_no_gradient():
    unet = tiny_unet().requires_grad_(False)
    synchroniser = tiny_synchroniser(unet).train()
    gradients = []
    for checkpointing in (False, True):
        for block in [*synchroniser.skip_blocks, synchroniser.middle_block]:
            block.gradient_checkpointing = checkpointing
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        maps = [level.requires_grad_() for level in tiny_maps()]
        _predict(unet, synchroniser, maps, torch.ones(2, 1)).square().mean().backward()
        gradients.append([level.grad for level in maps])

    torch.testing.assert_close(*gradients)


def test_a_half_precision_unet_takes_residuals_of_a_float32_synchroniser():
    unet = tiny_unet().to(torch.bfloat16)
    synchroniser = tiny_synchroniser(unet)
    latents, context = torch.randn(2, 4, 16, 16).bfloat16(), torch.randn(2, 5, 16).bfloat16()

    with synchroniser.attached(unet, tiny_maps(), torch.ones(2, 1)):
        assert unet(latents, 3, context).sample.dtype == torch.bfloat16


def test_skip_features_are_those_that_the_unet_makes():
    unet = tiny_unet()
    made = []
    for up_block in unet.up_blocks:
        up_block.register_forward_pre_hook(
            lambda module, args, kwargs: made.append([s.shape for s in kwargs["res_hidden_states_tuple"]]),
            with_kwargs=True,
        )

    unet(torch.randn(1, 4, 16, 16), 3, torch.randn(1, 5, 16))

    shapes = [shape for group in reversed(made) for shape in group]
    assert [(channels, 16 >> level) for channels, level in skip_features(unet.config)] == [s[1:3] for s in shapes]


def test_another_unet_is_refused():
    synchroniser = tiny_synchroniser(tiny_unet())
    other = tiny_unet()
    other.up_blocks = other.up_blocks[:1]

    with (
        pytest.raises(ValueError, match="4 skip features, but this one has a middle block and 2"),
        synchroniser.attached(other, tiny_maps(), torch.ones(2, 1)),
    ):
        pass


@pytest.mark.parametrize(
    ("maps", "mask", "message"),
    [
        (tiny_maps()[:1], torch.ones(2, 1), "Expected 2 maps an image, got 1"),
        (tiny_maps(images=10), torch.ones(2, 10), "`max_images=11`"),
        (tiny_maps(), torch.ones(2, 3), r"must be \(2, 1\)"),
        ([level[:, 0] for level in tiny_maps()], torch.ones(2, 1), "Maps must be"),
        (tiny_maps(batch=1), torch.ones(1, 1), "for 2 samples"),
    ],
)
def test_what_does_not_fit_is_refused(maps, mask, message):
    unet = tiny_unet()

    with pytest.raises(ValueError, match=message):
        _predict(unet, tiny_synchroniser(unet), maps, mask)


def test_values_that_the_official_code_holds_fixed_must_be_so():
    name = "visual_tokenizer.encoder.mmfs_module.mmfs_mid_block"

    with pytest.raises(ValueError, match="ignore_token`, .* is not zero, which"):
        convert_names({f"{name}.mmfs.ignore_token": torch.ones(1, 1, 1, 8)})
    with pytest.raises(ValueError, match="Was it trained"):
        convert_names({f"{name}.pos_embed": torch.ones(16, 8)})
