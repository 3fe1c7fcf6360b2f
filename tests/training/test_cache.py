import json

import pytest

from deem_plugin.cli import main
from deem_plugin.training.cache import cache_latents
from deem_plugin.training.recipes import load_recipe
from deem_plugin.training.run import train

from .helpers import tiny_overrides


def overrides(parts, out, **settings):
    return tiny_overrides(parts, out, model__model=parts / "llava", **settings)


def recipe(parts, out, **settings):
    return load_recipe("tiny-tune", overrides(parts, out, **settings))


def encoder_recipe(parts, out, **settings):
    """The recipe of an encoder alone, on all sixteen pictures."""
    stand_ins = {"model__encoder": parts / "clip", "data__path": parts / "images"}
    return load_recipe("deem", tiny_overrides(parts, out, **stand_ins, **settings))


def losses(out):
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [(row["loss"], row["feedback_loss"]) for row in history if "loss" in row]


@pytest.mark.parametrize("make", [recipe, encoder_recipe])
def test_a_recipe_trains_from_its_cache_as_without(parts, tmp_path, make):
    settings = {"training__max_steps": 3, "feedback__diffusion_model__latent_cache": tmp_path / "cache"}
    cache_latents(make(parts, tmp_path / "fill", **settings), batch_size=3)
    train(make(parts, tmp_path / "plain", training__max_steps=3))
    train(make(parts, tmp_path / "cached", **settings))

    assert len(losses(tmp_path / "plain")) == 3
    for expected, given in zip(losses(tmp_path / "plain"), losses(tmp_path / "cached"), strict=True):
        assert given == pytest.approx(expected, rel=1e-6)  # batches of other sizes round differently


def test_a_second_filling_finds_all_there(parts, tmp_path):
    given = recipe(parts, tmp_path, feedback__diffusion_model__latent_cache=tmp_path / "cache")

    first, second = cache_latents(given, batch_size=4), cache_latents(given, batch_size=5)

    assert (first.new, first.known, first.duplicates) == (12, 0, 0)  # every fourth conversation has no picture
    assert (second.new, second.known, second.duplicates) == (0, 12, 0)


def test_an_interrupted_filling_keeps_what_it_had_and_goes_on(parts, tmp_path, monkeypatch):
    from deem_plugin.feedback import VaeCodec

    given = recipe(parts, tmp_path, feedback__diffusion_model__latent_cache=tmp_path / "cache")
    with monkeypatch.context() as patch:
        calls, posterior = [], VaeCodec.posterior

        def interrupted(self, pictures):
            calls.append(len(pictures))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return posterior(self, pictures)

        patch.setattr(VaeCodec, "posterior", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache_latents(given, batch_size=4)

    counts = cache_latents(given, batch_size=4)
    assert (counts.new, counts.known) == (6, 6)


def test_a_picture_that_was_never_cached_stops_the_run(parts, tmp_path):
    settings = {"feedback__diffusion_model__latent_cache": tmp_path / "cache"}
    cache_latents(recipe(parts, tmp_path, **settings))

    with pytest.raises(ValueError, match="is not among the 12 in the latent cache .*deem cache-latents RECIPE"):
        train(encoder_recipe(parts, tmp_path / "out", **settings, training__max_steps=4))


def test_the_command_reports_counts_and_asks_for_a_folder(parts, tmp_path, capsys):
    given = overrides(parts, tmp_path)
    assert main(["cache-latents", "tiny-tune", *given]) == 1
    assert "names no cache to fill" in capsys.readouterr().err

    folder = f"feedback.diffusion_model.latent_cache={tmp_path / 'cache'}"
    assert main(["cache-latents", "tiny-tune", *given, folder, "--batch-size", "8"]) == 0
    printed = capsys.readouterr().out
    assert "12 pictures encoded, 0 were already there, 0 were duplicates." in printed
    assert str(tmp_path / "cache") in printed


def test_a_recipe_with_a_cache_can_be_planned(parts, tmp_path):
    from deem_plugin.planning.skeleton import build_skeleton

    skeleton = build_skeleton(
        recipe(parts, tmp_path, feedback__diffusion_model__latent_cache=tmp_path / "not-filled-yet")
    )

    assert skeleton.diffusion_model.latent_cache is None
