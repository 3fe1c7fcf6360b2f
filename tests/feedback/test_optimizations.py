"""What makes a frozen diffusion model cheaper leaves loss, gradient and weights as they were."""

import weakref
from contextlib import nullcontext

import pytest
import torch

from deem_plugin.feedback import (
    DiffusionFeedback,
    DiffusionFeedbackCallback,
    DiffusionModelConfig,
    load_diffusion_model,
)
from deem_plugin.feedback import quantization as quantization_module
from deem_plugin.feedback.early_gradient import early_gradient
from deem_plugin.feedback.optimizations import apply_optimizations, onloaded
from deem_plugin.feedback.quantization import quantization_config
from deem_plugin.planning.memory import quantized_bytes

from ..tiny import tiny_llava, tiny_sd_folder
from .helpers import KeyedFeedback, feedback_config, keyed_callback, relative_difference, train
from .tiny_diffusion_models import DIFFUSION_MODELS, save_diffusion_model

EXACT = 1e-5
EXACT_SETTINGS = ["gradient_checkpointing", "channels_last", "cpu_offload"]


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return str(tiny_sd_folder(tmp_path_factory.mktemp("sd")))


def run(folder, sd, **settings):
    """Trains a step with feedback from a whole tiny Stable Diffusion; returns callback and gradients."""
    callback = DiffusionFeedbackCallback(feedback_config(diffusion_model={"path": sd, **settings}))
    _, (gradients,) = train(folder, callback)
    return callback, gradients


def weights_of(diffusion_model):
    return {key: value.clone() for module in diffusion_model.modules() for key, value in module.state_dict().items()}


@pytest.mark.parametrize(
    "names",
    [*([name] for name in EXACT_SETTINGS), EXACT_SETTINGS, pytest.param(["compile"], marks=pytest.mark.slow)],
    ids=", ".join,
)
def test_exact_settings_change_neither_gradients_nor_the_diffusion_model(tmp_path, sd, names):
    _, expected = run(tmp_path, sd)

    callback, gradients = run(tmp_path, sd, **dict.fromkeys(names, True))

    assert relative_difference(expected, gradients) < EXACT
    assert relative_difference(expected, gradients, "feedback_conditioner") < EXACT
    after, before = weights_of(callback.diffusion_model), weights_of(load_diffusion_model(sd))
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not any(p.requires_grad for module in callback.diffusion_model.modules() for p in module.parameters())


@pytest.mark.parametrize("name", DIFFUSION_MODELS)
def test_checkpointing_recomputes_in_eval_mode_and_keeps_less(name, tmp_path):
    folder = save_diffusion_model(tmp_path, name)

    def step(**settings):
        diffusion_model = load_diffusion_model(folder)
        apply_optimizations(diffusion_model, DiffusionModelConfig(str(folder), **settings))
        model, kept, calls = diffusion_model.denoiser.model, [0], [0]
        assert not model.training
        context = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

        def keep(tensor):
            kept[0] += tensor.nbytes
            return tensor

        for module in model.modules():
            if not any(module.children()):
                module.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = DiffusionFeedback(diffusion_model.denoiser)(
                latents, context, generator=torch.Generator().manual_seed(2)
            )
        loss.sum().backward()
        return kept[0], calls[0], context.grad

    kept, calls, gradient = step()
    kept_less, more_calls, same = step(gradient_checkpointing=True)

    torch.testing.assert_close(same, gradient, rtol=EXACT, atol=EXACT * gradient.abs().max().item())
    assert more_calls > calls
    assert kept_less < 0.8 * kept


def test_weights_are_lent_and_come_back_even_after_an_error():
    module = torch.nn.Linear(2, 2).requires_grad_(False)
    home = module.weight.data_ptr()

    for outcome in (nullcontext(), pytest.raises(RuntimeError)):
        with outcome as raised, onloaded([module], torch.device("cpu")):
            assert module.weight.data_ptr() != home
            if raised is not None:
                raise RuntimeError
        assert module.weight.data_ptr() == home


def test_the_denoisers_activations_are_gone_before_the_language_model_runs(tmp_path):
    callback = keyed_callback()
    model, processor = tiny_llava()
    callback.attach(model, processor)
    outputs, alive = [], []
    for module in callback.diffusion_model.denoiser.model.modules():
        if not any(module.children()):
            module.register_forward_hook(lambda module, args, output: outputs.append(weakref.ref(output)))
    model.model.language_model.register_forward_pre_hook(
        lambda *_: alive.append(sum(output() is not None for output in outputs))
    )

    train(tmp_path, callback, model=model)

    assert len(outputs) > 20
    assert alive == [0]


def test_an_early_gradient_is_the_late_one_whatever_the_scale():
    first, second = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    weights = torch.tensor([0.5, 0.25, 1.0])

    def errors_of(a, nothing, b):
        assert nothing is None
        return (a * b).tanh().mean(dim=1)

    ((errors_of(2 * first, None, second.exp()) * weights).sum() * 7).backward()
    expected = first.grad, second.grad
    for scale in (7.0, 0.25):
        first.grad = second.grad = None
        total, errors, finite = early_gradient(errors_of, weights, scale, 2 * first, None, second.exp())
        assert errors.shape == (3,) and finite.all()
        (total * 7).backward()
        torch.testing.assert_close((first.grad, second.grad), expected)


def test_an_early_gradient_does_not_underflow_in_float16():
    value = torch.ones(1, 1, requires_grad=True)

    def errors_of(value):
        return ((value.half() * 1e-4).float() * 1e-5).sum(dim=1)

    early_gradient(errors_of, torch.ones(1), 2.0**16, value)[0].mul(2.0**16).backward()

    assert value.grad.item() == pytest.approx(1e-9 * 2**16, rel=1e-2)
    assert torch.autograd.grad(errors_of(value).sum(), value)[0].item() == 0


def test_an_error_or_a_gradient_that_is_not_finite_is_left_out_of_the_sum():
    value = torch.tensor([[1.0], [0.0], [2.0], [3.0]], requires_grad=True)

    def errors_of(value):
        # The second has no finite gradient, the third no finite error.
        return value[:, 0].sqrt() + torch.tensor([0.0, 0.0, float("nan"), 0.0])

    total, errors, finite = early_gradient(errors_of, torch.ones(4), 1.0, value)
    total.backward()

    assert finite.tolist() == [True, False, False, True] and total.item() == pytest.approx(1 + 3**0.5)
    assert value.grad.flatten().tolist() == pytest.approx([0.5, 0.0, 0.0, 0.5 / 3**0.5])


def test_offloading_needs_a_frozen_denoiser(sd):
    class OwnFeedback(KeyedFeedback):
        def __init__(self, denoiser):
            super().__init__(denoiser)
            self.denoiser = torch.nn.Identity()
            self.denoiser.context_dim = 16

    diffusion_model = load_diffusion_model(sd)
    config = feedback_config(diffusion_model={"path": sd, "cpu_offload": True})
    callback = DiffusionFeedbackCallback(config, diffusion_model, OwnFeedback(diffusion_model.denoiser))
    with pytest.raises(ValueError, match="`cpu_offload` needs an objective whose `denoiser` is frozen.*OwnFeedback"):
        callback.attach(*tiny_llava())


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="must be one of torchao_int8, bnb_8bit, bnb_4bit, got 'int3'"):
        DiffusionModelConfig("sd", quantization="int3")
    with pytest.raises(ValueError, match="Set one of the two"):
        DiffusionModelConfig("sd", quantization="bnb_4bit", cpu_offload=True)


@pytest.mark.parametrize(("name", "package"), quantization_module.QUANTIZATIONS.items())
def test_a_missing_package_is_an_error_that_says_what_to_install(name, package, monkeypatch):
    monkeypatch.setattr(quantization_module, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=rf"needs the package {package}.*deem-plugin\[quantized\]"):
        quantization_config(name, torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bitsandbytes_without_a_gpu_is_refused_with_what_works_there(monkeypatch):
    monkeypatch.setattr(quantization_module, "find_spec", lambda package: object())
    with pytest.raises(ValueError, match="on a GPU, and there is none. Set `quantization: torchao_int8`"):
        quantization_config("bnb_4bit", torch.float32)


def test_eight_bits_give_nearly_the_same_gradient_and_take_what_is_planned(tmp_path, sd):
    pytest.importorskip("torchao")
    _, expected = run(tmp_path, sd)
    before = quantized_bytes(load_diffusion_model(sd).denoiser.model, None)
    planned = quantized_bytes(load_diffusion_model(sd, weights=False).denoiser.model, "torchao_int8")

    callback, gradients = run(tmp_path, sd, quantization="torchao_int8", gradient_checkpointing=True)

    assert relative_difference(expected, gradients, "feedback_conditioner") < 0.1
    assert relative_difference(expected, gradients, "feedback_conditioner") > EXACT
    taken = 0
    for weight in callback.diffusion_model.denoiser.model.parameters():
        parts = [weight] if not hasattr(weight, "qdata") else [weight.qdata, weight.scale, weight.zero_point]
        taken += sum(part.nbytes for part in parts)
    assert taken == planned < before


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bnb_8bit", "bnb_4bit"])
def test_bitsandbytes_lets_the_gradient_through(name, tmp_path, sd):
    pytest.importorskip("bitsandbytes")
    if not torch.cuda.is_available():
        pytest.skip("bitsandbytes quantizes on a GPU")
    latents = torch.randn(2, 4, 16, 16, device="cuda")

    def gradient(**settings):
        diffusion_model = load_diffusion_model(sd, **settings).to("cuda")
        context = torch.ones(2, 5, 16, device="cuda", requires_grad=True)
        rng = torch.Generator("cuda").manual_seed(2)
        DiffusionFeedback(diffusion_model.denoiser)(latents, context, generator=rng).mean().backward()
        return context.grad

    expected, given = gradient(), gradient(quantization=name)
    assert ((given - expected).norm() / expected.norm()).item() < 0.3
