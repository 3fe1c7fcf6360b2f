"""Planted damage: what a tower does not see must show in the score of the picture and at its place on the map."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from datasets import load_dataset
from sklearn.metrics import roc_auc_score
from torchvision.transforms.functional import gaussian_blur, pil_to_tensor, to_pil_image

from deem_plugin.demo.diffusion_model import load_code, shipped_diffusion_model
from deem_plugin.demo.sets import probe_scenes
from deem_plugin.evaluation import mismatch_report
from deem_plugin.evaluation.mismatch import condition_gap, find_pictures, measure_mismatch
from deem_plugin.evaluation.trained_feedback import TrainedFeedback
from deem_plugin.feedback.config import FeedbackConfig
from deem_plugin.feedback.diffusion_model import load_diffusion_model
from deem_plugin.vision.views import View


class CodeFeedback(TrainedFeedback):
    """Its tower is the code that the shipped diffusion model was trained with, and sees what `damage` leaves."""

    device = torch.device("cpu")
    damage = staticmethod(lambda picture: picture)

    def view(self, image):
        [picture] = self.diffusion_model.resize(pil_to_tensor(image)[None] / 255)
        return View(self.model(self.damage(picture)[None] * 2 - 1)[0], picture, 0, mask=self.mask)

    def condition(self, views):
        return torch.stack([view.tokens for view in views]), None


def feedback(damage=None, mask=None):
    frozen, code = load_diffusion_model(str(shipped_diffusion_model())), load_code(shipped_diffusion_model())
    made = CodeFeedback(code, None, None, SimpleNamespace(), FeedbackConfig(), frozen)
    made.damage, made.mask = damage or made.damage, mask
    return made


def blurred_left(picture):
    return torch.cat([gaussian_blur(picture, [15, 15], 4.0)[..., :8], picture[..., 8:]], dim=-1)


def without_colour(picture):
    return picture.mean(0, keepdim=True).expand(3, -1, -1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more").mkdir()
    for index, picture in enumerate(probe_scenes(100)[1]):
        to_pil_image(picture).save(folder / ("more" if index % 2 else "") / f"{index:03d}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def seen(folder):
    return measure_mismatch(feedback(), find_pictures(folder), draws=32)


def test_a_folder_is_ranked_by_planted_damage(folder, seen):
    """A tenth of the pictures is seen without its colours."""
    damaged = measure_mismatch(feedback(without_colour), find_pictures(folder), draws=32)
    scores = [entry.mismatch for entry in [*damaged[:10], *seen[10:]]]

    assert roc_auc_score([1] * 10 + [0] * 90, scores) >= 0.9


@pytest.mark.slow
def test_a_map_shows_where_a_tower_has_become_blind(folder, seen):
    damaged = measure_mismatch(feedback(blurred_left), find_pictures(folder), draws=32)

    lost = torch.stack([after.map - before.map for before, after in zip(seen, damaged, strict=True)])
    left, right = lost[..., :8].mean((1, 2)), lost[..., 8:].mean((1, 2))

    assert (left > right).float().mean() >= 0.95


def test_tokens_of_another_picture_tell_nothing(folder):
    """A tower that sees the same picture everywhere has tokens that are worth as much as those of the others."""
    blind = measure_mismatch(feedback(torch.zeros_like), find_pictures(folder)[:20])

    assert [entry.mismatch for entry in blind] == pytest.approx([1.0] * 20)


@pytest.mark.slow
def test_the_standard_error_is_that_of_other_draws(folder):
    paths = find_pictures(folder)[:20]
    runs = [measure_mismatch(feedback(), paths, seed=seed) for seed in range(12)]
    scores = torch.tensor([[entry.mismatch for entry in run] for run in runs])
    claimed = torch.tensor([[entry.standard_error for entry in run] for run in runs]).mean(0)

    assert 0.75 < (claimed.mean() / scores.std(0).mean()) < 1.33


def test_pictures_are_measured_alike_in_any_batch_and_bars_do_not_count(folder):
    paths = find_pictures(folder)[:5]
    mask = torch.ones(16, 16, dtype=torch.bool)
    mask[:, 12:] = False
    first, second = (measure_mismatch(feedback(mask=mask), paths, 4, batch_size=size) for size in (5, 2))

    for one, other in zip(first, second, strict=True):
        assert one.mismatch == pytest.approx(other.mismatch, rel=1e-4)
        assert one.map[:, 12:].isnan().all() and not one.map[:, :12].isnan().any()
        torch.testing.assert_close(one.own.mean(), one.own_map.nanmean())


def test_the_condition_gap_is_what_the_tokens_save_and_grows_with_the_noise(folder, monkeypatch, tmp_path):
    paths = find_pictures(folder)[:24]
    seen, blind = (condition_gap(feedback(damage), paths, bins=4, draws=2) for damage in (None, torch.zeros_like))

    assert [(row["first"], row["last"]) for row in seen] == [(0, 249), (250, 499), (500, 749), (750, 999)]
    assert all(row["right"] < row["without"] < row["wrong"] for row in seen)
    assert seen[0]["gap"] < seen[1]["gap"] < seen[2]["gap"] and seen[2]["gap"] > 0.5
    assert all(row["gap"] == pytest.approx(0, abs=1e-6) for row in blind)
    monkeypatch.setattr(mismatch_report.TrainedFeedback, "load", lambda checkpoint, path: feedback())
    for picture in paths[:2]:
        shutil.copy(picture, tmp_path)
    report = mismatch_report.gap_report("any", tmp_path)
    assert "| 900 to 999 |" in report


def test_too_few_pictures_or_draws_and_an_empty_folder_are_errors(folder, tmp_path):
    for paths, draws in ((find_pictures(folder)[:1], 4), (find_pictures(folder), 1)):
        with pytest.raises(ValueError, match=r"Got \d+ picture\(s\) and \d draw\(s\)"):
            measure_mismatch(feedback(), paths, draws)
    with pytest.raises(ValueError, match="There is no picture file in"):
        find_pictures(tmp_path)


@pytest.mark.parametrize("new", [None, "new"])
def test_page_and_table_hold_every_picture_worst_first(folder, tmp_path, monkeypatch, new):
    made = {"base": feedback(), "new": feedback(without_colour)}
    monkeypatch.setattr(mismatch_report.TrainedFeedback, "load", lambda checkpoint, path: made[checkpoint])

    page = mismatch_report.write_mismatch("base", folder, tmp_path, new, draws=2)

    rows = load_dataset("parquet", data_files=str(tmp_path / "mismatch.parquet"), split="train", cache_dir=tmp_path)
    values = rows["difference" if new else "mismatch"]
    assert len(rows) == 100 and list(values) == sorted(values, reverse=True)
    assert {"more/001.png", "000.png"} <= set(rows["path"]) and len(rows[0]["map"]) == 16
    text = page.read_text(encoding="utf-8")
    assert text.count("<figure>") == 100 and "more/001.png" in text and "http" not in text
    if new:
        entry = rows[0]
        assert entry["difference"] == pytest.approx(entry["new_mismatch"] - entry["mismatch"])
        # Of the same draws: less than if the two were independent.
        assert sum(rows["difference_standard_error"]) < sum(rows["standard_error"]) + sum(rows["new_standard_error"])
