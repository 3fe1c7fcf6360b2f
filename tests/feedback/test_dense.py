"""`condition: queries+dense`: the UNet also looks at the maps of the very picture, as in DEEM's official code."""

import pytest
import torch
from PIL import Image

from deem_plugin.evaluation.reconstruction import reconstruct_files
from deem_plugin.feedback import DiffusionFeedbackCallback, load_diffusion_model
from deem_plugin.feedback.checkpoint import load_conditioner
from deem_plugin.feedback.conditions import dense_maps
from deem_plugin.vision.grids import sincos_position_embedding

from ..tiny import tiny_image, tiny_llava, tiny_sd_folder
from .helpers import begin_step, collate, feedback_config, mean_loss, samples, train, views_of
from .tiny_diffusion_models import save_diffusion_model

DENSE = {"condition": {"kind": "queries+dense"}}


def feedback_of(callback, batch):
    """The feedback of one training step, and the tower's gradients by it."""
    begin_step(callback)
    model = callback.model
    model.zero_grad()
    model.train()
    tower = model.model.vision_tower
    tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-2].sum().mul(0).backward()
    callback.hook.check_injected()
    gradients = {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}
    return mean_loss(callback), gradients


@pytest.mark.parametrize("leading", [0, 1, 5], ids=["patches alone", "class token", "and registers"])
def test_patches_are_laid_out_as_the_square_that_they_are(leading):
    tokens = torch.randn(2, leading + 9, 8, generator=torch.Generator().manual_seed(0))

    (level,) = dense_maps(views_of(tokens))

    patches = tokens[:, leading:].view(2, 3, 3, 8).permute(0, 3, 1, 2)
    torch.testing.assert_close(level, patches + sincos_position_embedding(8, 3, 3).T.view(8, 3, 3))


def test_the_towers_own_maps_come_first_and_unequal_pictures_are_an_error():
    maps = {"stride4": torch.zeros(2, 8, 8, 8), "stride8": torch.zeros(2, 8, 4, 4)}
    own = views_of(torch.zeros(2, 5, 8), maps=maps)

    assert [level.shape[-1] for level in dense_maps(own)] == [8, 4]
    with pytest.raises(ValueError, match="different numbers of them. Set `feedback.condition.kind` to queries"):
        dense_maps(views_of([torch.zeros(9, 8), torch.zeros(4, 8)]))


def test_at_first_it_is_the_feedback_of_the_queries_and_then_the_maps_speak(tmp_path):
    batch = collate(samples(tiny_llava()[1], count=2))
    model = {"path": str(tiny_sd_folder(tmp_path))}
    dense, plain = (
        DiffusionFeedbackCallback(feedback_config(diffusion_model=model, condition={"kind": kind}))
        for kind in ("queries+dense", "queries")
    )
    for callback in (dense, plain):
        callback.attach(*tiny_llava())
    unet = dense.diffusion_model.denoiser.model

    first, _ = feedback_of(dense, batch)
    assert first == feedback_of(plain, batch)[0]
    # The head of the queries says nothing now, so that what reaches the tower comes by the maps.
    torch.nn.init.zeros_(dense.conditioner.head.weight)
    silent = feedback_of(dense, batch)[1]
    assert not any(gradient.any() for gradient in silent.values())
    for block in dense.conditioner.synchroniser.skip_blocks:
        torch.nn.init.normal_(block.zero.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    spoken, gradients = feedback_of(dense, batch)

    assert spoken != first and any(gradient.any() for gradient in gradients.values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


def test_the_synchroniser_trains_is_saved_with_the_conditioner_and_reconstructs(tmp_path):
    folder = tiny_sd_folder(tmp_path / "sd")
    callback = DiffusionFeedbackCallback(feedback_config(diffusion_model={"path": str(folder)}, **DENSE))
    before = load_diffusion_model(str(folder)).denoiser.model.state_dict()

    trainer, _ = train(tmp_path / "run", callback, max_steps=2)

    loaded, settings = load_conditioner(tmp_path / "run")
    assert settings.condition.shows_maps and loaded.arguments == callback.conditioner.arguments
    assert any(block.zero.weight.any() for block in loaded.synchroniser.skip_blocks)
    after = callback.diffusion_model.denoiser.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    trainer.model.save_pretrained(tmp_path / "run")
    tiny_llava()[1].save_pretrained(tmp_path / "run")
    tiny_image(0).save(tmp_path / "picture.png")
    reconstruct_files(tmp_path / "run", [tmp_path / "picture.png"] * 2, tmp_path / "reconstructed.png", steps=2)
    assert Image.open(tmp_path / "reconstructed.png").width == 2 * 128 + 8


def test_a_diffusion_model_without_a_unet_and_several_runs_of_it_are_errors(tmp_path):
    config = feedback_config(diffusion_model={"path": str(save_diffusion_model(tmp_path, "sd3"))}, **DENSE)
    with pytest.raises(ValueError, match="this denoiser is a SD3Transformer2DModel. Set `feedback.condition.kind`"):
        DiffusionFeedbackCallback(config).attach(*tiny_llava())
    for other in ({"draws_per_image": 2}, {"kind": "contrastive"}):
        with pytest.raises(
            ValueError, match=rf"\['objective.{next(iter(other))}'\] would repeat, move, compile or skip"
        ):
            feedback_config(objective=other, **DENSE)
    for other in ("gradient_checkpointing", "cpu_offload", "compile"):
        with pytest.raises(ValueError, match=rf"\['{other}'\] would repeat, move, compile or skip"):
            feedback_config(diffusion_model={other: True}, **DENSE)
