"""Nothing goes wrong in silence: broken numbers, wrong statistics, towers that cannot learn, pictures missed."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlavaForConditionalGeneration, Trainer, TrainerCallback
from transformers.modeling_outputs import BaseModelOutput

from deem_plugin.feedback import DiffusionFeedbackCallback, FeedbackConfig
from deem_plugin.feedback.contrastive import ContrastiveFeedback
from deem_plugin.training.trainer import EncoderTrainer
from deem_plugin.vision.grids import sincos_position_embedding

from ..tiny import IMAGE_SIZE, tiny_llava, tiny_sd_folder
from .helpers import feedback_config, pixel_diffusion_model, relative_difference, samples
from .runs import UndrawnFeedback, by_hand, logged, make_trainer, normalized, pictures_of, run, undrawn_callback

EXACT = 1e-5
LOGGER = "deem_plugin.feedback.callback"


# Numbers that are not finite


class BrokenFeedback(UndrawnFeedback):
    """Breaks the loss of the first pictures of the calls in `breaking`."""

    breaking, rows = (0,), 1

    def __init__(self, denoiser):
        super().__init__(denoiser)
        self.calls = 0

    def __call__(self, latents, context, **options):
        errors = super().__call__(latents, context, **options)
        count = self.rows if self.calls in self.breaking else 0
        self.calls += 1
        return torch.cat([self.broken(errors[:count], context[:count]), errors[count:]])


class NanLoss(BrokenFeedback):
    def broken(self, errors, context):
        return errors * float("nan")


class InfiniteLoss(BrokenFeedback):
    def broken(self, errors, context):
        return errors * float("inf")


class NanGradient(BrokenFeedback):
    """The loss is finite and its gradient is not: the root of 0."""

    def broken(self, errors, context):
        return errors + (context.flatten(1).sum(dim=1) * 0).sqrt()


class OwnNanLoss:
    """An objective of the user's own, which shows no frozen denoiser, so that its gradient is not taken at once."""

    def __init__(self, denoiser):
        self.inner = NanLoss(denoiser)
        self.context_dim = denoiser.context_dim

    def __call__(self, latents, context, **options):
        return self.inner(latents, context, **options)


class OwnNanGradient(OwnNanLoss):
    def __init__(self, denoiser):
        super().__init__(denoiser)
        self.inner = NanGradient(denoiser)


BROKEN = [NanLoss, InfiniteLoss, NanGradient]


@pytest.mark.parametrize("objective", BROKEN)
def test_a_picture_whose_feedback_is_not_finite_is_left_out(tmp_path, objective):
    """The gradient is that of the other three; the fourth's share of the language model's loss stays."""
    _, processor = tiny_llava()
    expected, errors = _by_hand_without_the_first(samples(processor))
    callback = undrawn_callback(objective)

    trainer, (gradients,) = run(tmp_path, callback)

    assert relative_difference(expected, gradients) < EXACT
    assert relative_difference(expected, gradients, "feedback_conditioner") < EXACT
    assert all(value.isfinite().all() for value in trainer.model.parameters())
    assert all(value.isfinite().all() for value in callback.conditioner.parameters())
    assert logged(trainer, "feedback_nonfinite") == [1]
    assert logged(trainer, "feedback_loss") == [pytest.approx(errors[1:].mean().item(), rel=1e-5)]


def _by_hand_without_the_first(rows):
    whole, errors = by_hand(rows, conversations=4)
    without = by_hand(rows, conversations=4, counts=[0, 1, 1, 1])[0]
    assert relative_difference(whole, without, "feedback_conditioner") > 0.01
    return without, errors


def test_a_denoiser_that_overflows_once_does_not_ruin_the_model(tmp_path):
    """As a UNet in half precision does: the output for one picture is NaN in the second step."""
    callback = undrawn_callback()
    network = callback.diffusion_model.denoiser.model
    calls = []

    def overflow(module, args, output):
        calls.append(1)
        if len(calls) == 2:
            output.sample[0] = float("nan")
        return output

    network.register_forward_hook(overflow)

    trainer, steps = run(tmp_path, callback, max_steps=3)

    assert all(value.isfinite().all() for step in steps for value in step.values())
    assert all(value.isfinite().all() for value in trainer.model.parameters())
    assert logged(trainer, "feedback_nonfinite") == [1]
    assert len(logged(trainer, "feedback_loss")) == 3


@pytest.mark.parametrize("objective", [OwnNanLoss, OwnNanGradient])
def test_an_objective_of_ones_own_is_guarded_too(tmp_path, objective):
    _, processor = tiny_llava()
    expected, _ = _by_hand_without_the_first(samples(processor))

    trainer, (gradients,) = run(tmp_path, undrawn_callback(objective))

    assert relative_difference(expected, gradients) < EXACT
    assert logged(trainer, "feedback_nonfinite") == [1]


def test_a_synchroniser_is_guarded_too(tmp_path):
    """It trains inside the run of the denoiser that overflows for one picture."""
    folder = tiny_sd_folder(tmp_path / "sd")
    config = feedback_config(diffusion_model={"path": str(folder)}, condition={"kind": "queries+dense"})
    callback = DiffusionFeedbackCallback(config)
    model, processor = tiny_llava()
    callback.attach(model, processor)
    calls = []

    def overflow(module, args, output):
        calls.append(1)
        if len(calls) == 2:
            output.sample[0] = float("nan")
        return output

    callback.diffusion_model.denoiser.model.register_forward_hook(overflow)

    trainer, steps = run(tmp_path / "run", callback, model=model, max_steps=3)

    assert all(value.isfinite().all() for step in steps for value in step.values())
    assert all(value.isfinite().all() for value in callback.conditioner.parameters())
    assert logged(trainer, "feedback_nonfinite") == [1]


def test_finite_feedback_logs_no_count(tmp_path):
    trainer, _ = run(tmp_path, undrawn_callback(), max_steps=2)

    assert not logged(trainer, "feedback_nonfinite") and not logged(trainer, "feedback_blank")


@pytest.mark.parametrize("objective", BROKEN)
def test_training_stops_where_the_feedback_keeps_breaking(tmp_path, objective):
    always = type("Always", (objective,), {"breaking": range(1000), "rows": 2})
    trainer, _ = make_trainer(tmp_path, undrawn_callback(always), max_steps=100)

    with pytest.raises(RuntimeError, match=r"of \d+ pictures was not finite"):
        trainer.train()

    assert trainer.state.global_step < 20
    assert all(value.isfinite().all() for value in trainer.model.parameters())


def test_training_stops_where_no_feedback_is_finite(tmp_path):
    always = type("Always", (NanLoss,), {"breaking": range(1000), "rows": 4})

    with pytest.raises(RuntimeError, match="4 of 4 pictures was not finite"):
        run(tmp_path, undrawn_callback(always), max_steps=100)


def test_a_rare_break_does_not_stop_the_training(tmp_path):
    rare = type("Rare", (NanLoss,), {"breaking": range(9, 1000, 10)})

    trainer, _ = run(tmp_path, undrawn_callback(rare), max_steps=20, logging_steps=10)

    assert trainer.state.global_step == 20
    assert logged(trainer, "feedback_nonfinite") == [1, 1]


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0])
def test_a_weight_that_is_no_number_is_refused(weight):
    with pytest.raises(ValueError, match="weight.*must be a finite number"):
        FeedbackConfig(weight=weight)


# Pictures


def test_a_picture_of_one_colour_gets_no_feedback_and_is_counted(tmp_path):
    """Frameworks put a blank picture into batches of text alone."""
    _, processor = tiny_llava()
    rows = samples(processor)
    rows[0]["pixel_values"] = normalized(processor, torch.ones(3, IMAGE_SIZE, IMAGE_SIZE))
    expected, errors = by_hand(rows, conversations=4, counts=[0, 1, 1, 1])

    trainer, (gradients,) = run(tmp_path, undrawn_callback(), rows=rows)

    assert relative_difference(expected, gradients) < EXACT
    assert logged(trainer, "feedback_blank") == [1] and not logged(trainer, "feedback_nonfinite")
    assert logged(trainer, "feedback_loss") == [pytest.approx(errors[1:].mean().item(), rel=1e-5)]


WRONG_STATISTICS = {
    "bytes": lambda picture, given: picture * 255,
    "other statistics": lambda picture, given: picture * 4 - 2,
    "normalised twice": lambda picture, given: given * 4 - 1,
}


@pytest.mark.parametrize("wrong", WRONG_STATISTICS.values(), ids=WRONG_STATISTICS)
def test_pictures_of_other_statistics_are_refused_at_the_first_step(tmp_path, wrong):
    _, processor = tiny_llava()
    rows = samples(processor)
    for row in rows:
        row["pixel_values"] = wrong(torch.rand(3, IMAGE_SIZE, IMAGE_SIZE), row["pixel_values"])

    with pytest.raises(ValueError, match=r"outside \[0, 1\].*image_mean"):
        run(tmp_path, undrawn_callback(), rows=rows)


def test_statistics_that_are_set_wrongly_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"outside \[0, 1\].*image_std"):
        run(tmp_path, undrawn_callback(image_mean=[0.5] * 3, image_std=[0.5] * 3))


class WithVideos(LlavaForConditionalGeneration):
    """Takes videos, which never reach the vision tower."""

    def forward(self, pixel_values_videos=None, **kwargs):
        return super().forward(**kwargs)


def test_pictures_that_the_tower_never_saw_are_reported(tmp_path, caplog):
    torch.manual_seed(0)
    llava, processor = tiny_llava()
    rows = samples(processor, with_images=False)
    rows = [{**row, "pixel_values_videos": torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE)} for row in rows]

    with caplog.at_level(logging.WARNING, LOGGER):
        run(tmp_path, undrawn_callback(), model=WithVideos(llava.config), rows=rows, max_steps=2)

    reports = [record.getMessage() for record in caplog.records if "never saw" in record.getMessage()]
    assert len(reports) == 2 and "CLIPVisionModel" in reports[0]


@pytest.mark.parametrize("with_images", [True, False])
def test_nothing_is_reported_where_nothing_is_missed(tmp_path, caplog, with_images):
    _, processor = tiny_llava()

    with caplog.at_level(logging.WARNING, LOGGER):
        run(tmp_path, undrawn_callback(), rows=samples(processor, with_images=with_images))

    assert not [record for record in caplog.records if record.name == LOGGER]


# Towers that cannot learn


def test_a_tower_of_which_only_an_unread_layer_trains_is_refused():
    """LLaVA reads the second-last layer; with the last one alone trainable, the conditioner alone would learn."""
    model, processor = tiny_llava()
    tower = model.model.vision_tower
    tower.requires_grad_(False)
    tower.encoder.layers[-1].requires_grad_(True)

    with pytest.raises(ValueError, match="CLIPVisionModel.*nothing trainable that influences the tokens"):
        undrawn_callback().attach(model, processor)


def test_a_frozen_tower_is_refused():
    model, processor = tiny_llava()
    model.model.vision_tower.requires_grad_(False)

    with pytest.raises(ValueError, match="CLIPVisionModel.*is frozen.*Unfreeze"):
        undrawn_callback().attach(model, processor)


def test_a_tower_that_lora_leaves_frozen_is_refused():
    model, processor = tiny_llava()
    model = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))

    with pytest.raises(ValueError, match="is frozen"):
        undrawn_callback().attach(model, processor)


@pytest.mark.parametrize("part", ["the tower", "all but the last layer"])
def test_a_tower_that_is_frozen_after_attach_stops_the_first_step(tmp_path, part):
    model, processor = tiny_llava()
    callback = undrawn_callback()
    callback.attach(model, processor)
    tower = model.model.vision_tower
    tower.requires_grad_(False)
    tower.encoder.layers[-1].requires_grad_(part != "the tower")

    with pytest.raises(ValueError, match="The vision tower .*(is frozen|nothing trainable).*`conditioner_only`"):
        run(tmp_path, callback, model=model)


def test_a_tower_that_is_frozen_between_two_trainings_stops_the_second(tmp_path):
    trainer, _ = run(tmp_path, undrawn_callback())
    trainer.model.model.vision_tower.requires_grad_(False)

    with pytest.raises(ValueError, match="The vision tower .*(is frozen|nothing trainable).*`conditioner_only`"):
        trainer.train()


def test_a_conditioner_alone_trains_where_it_is_asked_for(tmp_path):
    model, _ = tiny_llava()
    model.model.vision_tower.requires_grad_(False)

    trainer, (gradients,) = run(tmp_path, undrawn_callback(conditioner_only=True), model=model)

    assert any(value.any() for name, value in gradients.items() if "feedback_conditioner" in name)
    assert not any("vision_tower" in name for name in gradients)
    assert len(logged(trainer, "feedback_loss")) == 1


class NoGradientTrainer(Trainer):
    """Leaves the picture's part out of the loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss.detach() + sum(parameter.sum() for parameter in model.lm_head.parameters()) * 0


def test_feedback_whose_gradient_never_enters_the_backward_pass_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="1 of 1 feedback losses never reached the vision tower"):
        run(tmp_path, undrawn_callback(), trainer_class=NoGradientTrainer)


def test_a_denoiser_that_trains_gets_its_gradient():
    """Its gradient cannot be taken early at the conditions alone."""
    model, processor = tiny_llava()
    callback = undrawn_callback()
    network = callback.diffusion_model.denoiser.model.requires_grad_(True)
    callback.attach(model, processor)
    callback.hook.state.scale = 2.0
    batch = {name: torch.stack([row[name] for row in samples(processor)]) for name in samples(processor)[0]}

    model.train()(**batch).loss.backward()

    gradients = {name: value.grad.clone() for name, value in network.named_parameters()}
    network.zero_grad()
    pixels = batch["pixel_values"]
    tokens = model.model.vision_tower.forward(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    errors = callback.objective(2 * pictures_of(processor, pixels) - 1, callback.conditioner(tokens))
    (2.0 * errors.sum()).backward()
    expected = {name: value.grad for name, value in network.named_parameters()}
    assert relative_difference(expected, gradients) < EXACT


def test_a_step_of_an_encoder_without_feedback_has_a_finite_loss():
    """Where a token overflows, as in half precision: 0 * inf is no number."""
    tokens = torch.ones(1, 4, 8, requires_grad=True)
    tokens = torch.where(torch.arange(8) == 0, tokens * float("inf"), tokens)

    loss = EncoderTrainer.compute_loss(None, lambda: BaseModelOutput(last_hidden_state=tokens), {})

    assert loss.item() == 0.0 and loss.requires_grad


# Random numbers


@pytest.fixture
def cuda_seeds(monkeypatch):
    """The seeds that all GPUs were given."""
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeds.append)
    return seeds


DRAWING = [{}, {"objective": {"kind": "contrastive"}}, {"condition": {"kind": "cls+patches", "num_patches": 4}}]


@pytest.mark.parametrize("settings", DRAWING, ids=["mse", "contrastive", "patches"])
def test_no_global_generator_is_touched(cuda_seeds, settings):
    """By attaching and by a step of training."""
    model, processor = tiny_llava()
    callback = DiffusionFeedbackCallback(feedback_config(**settings), pixel_diffusion_model())
    batch = {name: torch.stack([row[name] for row in samples(processor)]) for name in samples(processor)[0]}
    cuda_seeds.clear()
    before = torch.get_rng_state()

    callback.attach(model, processor)
    callback.hook.state.scale = 1.0
    model.train()(**batch).loss.backward()

    assert callback.conditioner.head.weight.grad is not None
    assert torch.equal(torch.get_rng_state(), before)
    assert not cuda_seeds


def test_an_augmentation_touches_no_global_generator(cuda_seeds):
    before = torch.get_rng_state()

    picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    ContrastiveFeedback(None).augment(picture, None, torch.Generator().manual_seed(0))

    assert torch.equal(torch.get_rng_state(), before) and not cuda_seeds


class StateProbe(TrainerCallback):
    """Keeps the state of the global generator after each step."""

    def __init__(self):
        self.states = []

    def on_step_end(self, args, state, control, **kwargs):
        self.states.append(torch.get_rng_state())


def test_a_training_draws_as_one_without_feedback_does(tmp_path):
    """With dropout in the language model, which draws in each step."""

    def states(callback):
        model, _ = tiny_llava()
        for layer in model.model.language_model.layers:
            layer.self_attn.attention_dropout = 0.1
        probe = StateProbe()
        run(tmp_path, callback, model=model, callbacks=[probe], max_steps=2)
        return probe.states

    plain = states(None)
    with_feedback = states(DiffusionFeedbackCallback(feedback_config(), pixel_diffusion_model()))

    assert not torch.equal(plain[0], plain[1])
    assert all(torch.equal(*pair) for pair in zip(plain, with_feedback, strict=True))


# Devices


class NoDoubles(TorchDispatchMode):
    """Raises at operations on a device that give float64, which Apple's GPUs do not have."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor) and value.device.type == self.device:
                assert value.dtype != torch.float64, function
        return result


def test_a_step_needs_no_double_precision():
    model, processor = tiny_llava()
    callback = DiffusionFeedbackCallback(feedback_config(), pixel_diffusion_model())
    callback.attach(model, processor)
    callback.hook.state.scale = 1.0
    batch = {name: torch.stack([row[name] for row in samples(processor)]) for name in samples(processor)[0]}

    with NoDoubles("cpu"):
        model.train()(**batch).loss.backward()

    assert callback.conditioner.head.weight.grad is not None


def test_the_own_towers_positions_need_no_double_precision_on_the_device():
    with NoDoubles("meta"):
        positions = sincos_position_embedding(8, 3, 3, device="meta")

    assert positions.device.type == "meta" and positions.shape == (9, 8)
