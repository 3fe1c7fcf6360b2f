"""Feedback at the language model's own outputs, in a tiny LLaVA."""

import pytest
import torch

from deem_plugin.feedback import DiffusionFeedbackCallback, DiffusionModel, ObjectiveConfig, PixelCodec, RossConfig
from deem_plugin.feedback.checkpoint import load_conditioner
from deem_plugin.feedback.diffusion_model import load_autoencoder
from deem_plugin.feedback.token_denoiser import TokenDenoiser

from ..tiny import tiny_llava, tiny_sd_folder
from .helpers import begin_step, collate, mean_loss, relative_difference, samples, train

CONFIG = {"weight": 50.0, "width": 16, "layers": 1, "heads": 2}


class KeyedNoise(DiffusionFeedbackCallback):
    """Draws noise and timesteps as functions of the picture, and starts with a head that says something."""

    def attach(self, model, processing_class=None, **options):
        attached = self.hook is not None
        super().attach(model, processing_class, **options)
        if attached:
            return
        for name, parameter in self.conditioner.named_parameters():
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(name)))
        self.hook.loss.objective = _Keyed(self.hook.loss.objective)


class _Keyed:
    def __init__(self, feedback):
        self.feedback, self.denoiser = feedback, feedback.denoiser

    def __call__(self, latents, context, *, generator=None):
        noise = [
            torch.randn(x.shape, generator=torch.Generator().manual_seed(int(x.double().abs().sum() * 1e4)))
            for x in latents
        ]
        timesteps = (latents.double().abs().flatten(1).sum(1) * 1e3).long() % 1000
        return self.feedback(latents, context, timesteps=timesteps, noise=torch.stack(noise))


def callback_for(**settings):
    objective = ObjectiveConfig(**settings.pop("objective", {}))
    return KeyedNoise(RossConfig(objective=objective, **{**CONFIG, **settings}), DiffusionModel(None, PixelCodec()))


def per_image(callback, batch):
    """Runs the model in training and returns the feedback that the hook computed."""
    model = callback.model
    begin_step(callback)
    model.train()
    model(**batch).loss.backward()
    callback.hook.check_injected()
    return mean_loss(callback)


def attached(**settings):
    callback = callback_for(**settings)
    callback.attach(*tiny_llava())
    return callback


def test_language_model_projector_and_tower_learn_from_it(tmp_path):
    trainer, (gradients,) = train(tmp_path, callback_for())

    lm_only = train(tmp_path)[1][0]
    both = {name: gradients[name] for name in lm_only}
    for part in ("language_model", "multi_modal_projector", "vision_tower"):
        assert relative_difference(lm_only, both, part) > 1e-3, part
    assert any("feedback_conditioner" in name for name in gradients)
    assert trainer.state.log_history[0]["feedback_loss"] > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"gradient_checkpointing": True},
    ],
    ids=["accumulate 4 of 1", "checkpointing"],
)
def test_gradients_do_not_depend_on_how_the_batch_is_run(settings, tmp_path):
    _, (whole,) = train(tmp_path, callback_for())
    _, (parts,) = train(tmp_path, callback_for(), **settings)

    assert relative_difference(whole, parts) < 1e-5


def test_padding_on_either_side_gives_the_same_loss():
    batch = collate(samples(tiny_llava()[1]))
    pad = torch.zeros(4, 5, dtype=torch.long)

    def padded(left):
        fill = {"input_ids": pad, "attention_mask": pad, "labels": pad - 100}
        parts = {name: (value, batch[name]) if left else (batch[name], value) for name, value in fill.items()}
        return {name: torch.cat(part, dim=1) for name, part in parts.items()} | {"pixel_values": batch["pixel_values"]}

    left, right = per_image(attached(), padded(True)), per_image(attached(), padded(False))

    assert left == pytest.approx(right, rel=1e-4)


def test_rows_of_text_alone_count_nothing():
    """ROSS's code trains on them, with a condition of zeros and a grey picture."""
    _, processor = tiny_llava()
    batch, text = collate(samples(processor)), collate(samples(processor, with_images=False))
    mixed = {name: torch.cat([batch[name], text[name]]) for name in text} | {"pixel_values": batch["pixel_values"]}

    alone, beside = per_image(attached(), batch), per_image(attached(), mixed)

    assert beside == pytest.approx(alone, rel=1e-5)
    assert per_image(attached(), text) is None


def test_two_pictures_in_a_row_are_two_rows_of_one():
    _, processor = tiny_llava()
    batch = collate(samples(processor, count=2))
    first, second = (batch["input_ids"][row] for row in range(2))
    callback = attached()
    seen = []
    callback.hook.loss.objective = _Recorder(callback.hook.loss.objective, seen)
    per_image(callback, batch)
    joined = {
        "input_ids": torch.cat([first, second])[None],
        "labels": torch.cat([batch["labels"][0], batch["labels"][1]])[None],
        "pixel_values": batch["pixel_values"],
    }
    per_image(callback, joined)

    (_, apart), (_, together) = seen
    torch.testing.assert_close(together[0], apart[0])  # the first sees nothing before it in either case
    assert together.shape == apart.shape == (2, 16, apart.shape[2])
    torch.testing.assert_close(seen[0][0], seen[1][0])


class _Recorder:
    def __init__(self, feedback, seen):
        self.feedback, self.denoiser, self.seen = feedback, feedback.denoiser, seen

    def __call__(self, latents, context, *, generator=None):
        self.seen.append((latents.detach(), context.detach()))
        return self.feedback(latents, context, generator=generator)


def test_it_is_saved_beside_the_model_and_resumed(tmp_path):
    callback = callback_for()

    trainer, _ = train(tmp_path, callback)

    loaded, settings = load_conditioner(tmp_path)
    assert isinstance(loaded, TokenDenoiser) and settings == callback.config
    trained = callback.conditioner.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in loaded.state_dict().items())
    trainer.model.save_pretrained(tmp_path / "saved")
    from safetensors import safe_open

    with safe_open(tmp_path / "saved" / "model.safetensors", framework="pt") as file:
        assert not any("feedback" in name for name in file.keys())


def test_of_a_diffusion_model_the_autoencoder_alone_is_read(tmp_path):
    import shutil

    folder = tiny_sd_folder(tmp_path / "sd")
    shutil.rmtree(folder / "unet")

    autoencoder = load_autoencoder(str(folder))

    assert autoencoder.denoiser is None
    assert autoencoder.codec.encode(torch.rand(1, 3, 16, 32)).shape[-2:] == (8, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": float("inf")}, "`weight` must be a finite number"),
        ({"token_cells": 0}, "`token_cells` must be at least 1, got 0"),
        ({"width": 10, "heads": 3}, r"`width` \(10\) must be a multiple of `heads` \(3\)"),
        ({"objective": ObjectiveConfig("contrastive")}, "`objective.kind` must be one of mse, got 'contrastive'"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RossConfig(**settings)


def test_a_model_to_load_must_be_named():
    with pytest.raises(ValueError, match="set `autoencoder` to a folder"):
        DiffusionFeedbackCallback(RossConfig())
