"""Pictures sampled from the tokens of checkpoints that were trained with feedback."""

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from deem_plugin.cli import main
from deem_plugin.demo.sets import probe_scenes
from deem_plugin.evaluation.reconstruction import draw_rows, reconstruct
from deem_plugin.feedback import DiffusionFeedbackCallback
from deem_plugin.feedback.diffusion_model import load_diffusion_model
from deem_plugin.feedback.sampling import sample_pictures
from deem_plugin.training.recipes import load_recipe
from deem_plugin.training.run import train as train_recipe

from ..feedback.helpers import feedback_config, train
from ..feedback.tiny_diffusion_models import save_diffusion_model
from ..models.tiny_deem import CONTEXT_DIM, tiny_deem
from ..tiny import tiny_image, tiny_llava, tiny_sd_folder
from ..training.conftest import parts  # noqa: F401
from ..training.helpers import tiny_overrides
from .test_mismatch import feedback, without_colour


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    config = feedback_config(diffusion_model={"path": str(tiny_sd_folder(folder / "sd"))})
    trainer, _ = train(folder / "run", DiffusionFeedbackCallback(config), max_steps=1)
    trainer.model.save_pretrained(folder / "run")
    tiny_llava()[1].save_pretrained(folder / "run")
    for index in range(2):
        tiny_image(index).save(folder / f"{index}.png")
    return folder


def test_the_command_draws_both_checkpoints_and_prints_scores(checkpoint, tmp_path, capsys):
    pictures = [str(checkpoint / f"{index}.png") for index in range(2)]
    run, out = str(checkpoint / "run"), tmp_path / "new" / "grid.png"

    assert main(["reconstruct", run, *pictures, "--out", str(out), "--steps", "2", "--before", run]) == 0

    said = capsys.readouterr().out.splitlines()
    before, after = (line.partition(": ") for line in said[:2])
    assert (before[0], after[0]) == ("before", "after") and before[2] == after[2] and "SSIM" in after[2]
    assert said[2] == f"Saved {out}." and Image.open(out).width == 2 * 128 + 8


def test_a_vision_encoder_alone_is_reconstructed_and_ranked(parts, tmp_path, capsys):  # noqa: F811
    settings = {"model__encoder": parts / "clip", "data__path": parts / "images"}
    settings["feedback__condition__num_patches"] = 7
    final = train_recipe(load_recipe("diva", tiny_overrides(parts, tmp_path, **settings)))
    pictures = [str(path) for path in sorted((parts / "images").rglob("*.png"))[:2]]

    assert main(["reconstruct", str(final), *pictures, "--out", str(tmp_path / "grid.png"), "--steps", "1"]) == 0
    out = tmp_path / "mismatch"
    assert main(["mismatch", str(final), str(parts / "images"), "--out", str(out), "--draws", "2"]) == 0

    assert (out / "mismatch.html").is_file() and (out / "mismatch.parquet").is_file()


def test_scores_fall_with_what_the_tower_does_not_see():
    images = [to_pil_image(picture) for picture in probe_scenes(8)[1]]
    seen, grey = (reconstruct(feedback(damage), images, steps=10) for damage in (None, without_colour))

    assert seen.psnr > grey.psnr + 2 and seen.ssim > grey.ssim
    assert 0.9 < seen.similarity < 1
    less = reconstruct(feedback(without_colour), images, steps=10, strength=0.3)
    assert less.psnr > grey.psnr + 2
    torch.testing.assert_close(reconstruct(feedback(), images, steps=10).sampled, seen.sampled)
    assert not torch.equal(reconstruct(feedback(), images, steps=10, seed=1).sampled, seen.sampled)


@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
def test_little_noise_leaves_the_picture_whatever_the_context_says(kind, tmp_path):
    frozen = load_diffusion_model(str(save_diffusion_model(tmp_path, kind)))
    latents = torch.randn(1, frozen.denoiser.channels, *[frozen.denoiser.sample_size] * 2)
    context, options = torch.randn(1, 4, frozen.denoiser.context_dim), {"steps": 50, "latents": latents}
    kept = frozen.codec.decode(latents) / 2 + 0.5

    differences = [
        (sample_pictures(frozen, context, strength=strength, **options) - kept).abs().mean().item()
        for strength in (0.02, 1.0)
    ]

    assert differences[0] < differences[1] / 3
    for wrong in ({"strength": 0.0}, {"strength": 1.5}, {"strength": 0.5, "latents": None}):
        with pytest.raises(ValueError, match="must be in"):
            sample_pictures(frozen, context, **{**options, **wrong})


def test_rows_are_enlarged_and_titled():
    page = draw_rows({"original": torch.zeros(3, 3, 16, 16), "reconstructed": torch.ones(3, 3, 16, 16)})

    assert page.width == 3 * 128 + 8 and page.getpixel((10, 40)) == (0, 0, 0)


def test_an_interleaved_model_is_reconstructed_by_its_own_head(checkpoint, tmp_path, capsys):
    for name, width in (("draws", CONTEXT_DIM), ("reads", None)):
        model, processor = tiny_deem(context_dim=width)
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    picture, out = str(checkpoint / "0.png"), tmp_path / "grid.png"
    arguments = ["reconstruct", str(tmp_path / "draws"), picture, "--out", str(out), "--steps", "1"]

    assert main([*arguments, "--diffusion-model", str(checkpoint / "sd")]) == 0 and out.is_file()
    assert main(arguments) == 1 and "Name its folder by `--diffusion-model`" in capsys.readouterr().err
    arguments[1] = str(tmp_path / "reads")
    assert main(arguments) == 1 and "made without a diffusion model" in capsys.readouterr().err
