"""The shipped diffusion model: it loads as any other, and right conditions serve it better than wrong ones."""

from dataclasses import replace

import torch

from deem_plugin.demo.diffusion_model import (
    CONTEXT_DIM,
    CONTEXT_TOKENS,
    IMAGE_SIZE,
    PictureCode,
    build_scheduler,
    build_transformer,
    load_code,
    main,
    save_diffusion_model,
    shipped_diffusion_model,
    train_diffusion_model,
)
from deem_plugin.demo.scenes import SHAPES, TEXTURES, render_scenes, sample_scenes
from deem_plugin.feedback.diffusion_feedback import DiffusionFeedback
from deem_plugin.feedback.diffusion_model import load_diffusion_model


def test_shipped_diffusion_model_is_small_and_works_on_pixels():
    folder = shipped_diffusion_model()
    diffusion_model = load_diffusion_model(str(folder))
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 4e6
    assert diffusion_model.image_size == IMAGE_SIZE
    assert diffusion_model.denoiser.context_dim == CONTEXT_DIM
    assert diffusion_model.denoiser.scheduler.config.prediction_type == "v_prediction"


def contexts_for(pictures, feedback, steps=40):
    """Finds for each picture a context under which the frozen diffusion model restores it well."""
    rng = torch.Generator().manual_seed(0)
    context = 0.5 * torch.randn(len(pictures), CONTEXT_TOKENS, CONTEXT_DIM, generator=rng)
    context.requires_grad_(True)
    optimizer = torch.optim.Adam([context], lr=0.1)
    timesteps = torch.full((len(pictures),), 600)
    for _ in range(steps):
        loss = feedback(pictures, context, timesteps=timesteps, generator=rng).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return context.detach()


def test_shipped_diffusion_model_tells_shape_position_and_background_apart():
    """Feedback from a diffusion model that does not would be useless: any context would get the same error."""
    scenes = sample_scenes(16, torch.Generator().manual_seed(3))
    others = {
        "shape": replace(scenes, shape=(scenes.shape + 1) % len(SHAPES)),
        "position": replace(scenes, x=-scenes.x, y=-scenes.y),
        "texture": replace(scenes, texture=(scenes.texture + 1) % len(TEXTURES)),
    }
    pictures = render_scenes(scenes, IMAGE_SIZE) * 2 - 1
    feedback = DiffusionFeedback(load_diffusion_model(str(shipped_diffusion_model())).denoiser)
    context = contexts_for(pictures, feedback)
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(4))
    for timestep in (350, 650):
        timesteps = torch.full((len(scenes),), timestep)
        with torch.no_grad():
            right = feedback(pictures, context, timesteps=timesteps, noise=noise).mean()
            for attribute, wrong_scenes in others.items():
                wrong_pictures = render_scenes(wrong_scenes, IMAGE_SIZE) * 2 - 1
                wrong = feedback(wrong_pictures, context, timesteps=timesteps, noise=noise).mean()
                assert wrong > 1.3 * right, (attribute, timestep)


def test_training_is_deterministic_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, _, _ = train_diffusion_model(steps=2, scenes=100)
    assert torch.equal(torch.rand(1), expected)
    second, _, _ = train_diffusion_model(steps=2, scenes=100)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_saved_diffusion_model_comes_back_through_the_feedback_room(tmp_path):
    transformer, code = build_transformer(), PictureCode()
    save_diffusion_model(transformer, build_scheduler(), code, tmp_path)
    loaded = load_diffusion_model(str(tmp_path)).denoiser.model
    pictures, context = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE), torch.randn(2, CONTEXT_TOKENS, CONTEXT_DIM)
    timesteps = torch.tensor([10, 900])
    with torch.no_grad():
        outputs = [
            model(pictures, encoder_hidden_states=context, timestep=timesteps).sample
            for model in (transformer.eval(), loaded)
        ]
    assert torch.equal(*outputs)
    assert torch.equal(load_code(tmp_path).linear.weight, code.linear.weight)


def test_command_without_a_folder_says_how_it_is_used(capsys):
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err
