"""Parity beyond the fixtures' own cases: every layout of a row by an oracle in loops, masks, each defect by itself."""

import random

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import interpolate

from deem_plugin.models import interleaving as il
from deem_plugin.models.denoising import DenoisingBatch, DenoisingHeads, totals_of
from deem_plugin.models.official import convert_state_dict
from deem_plugin.vision import DeemVisionConfig, DeemVisionTower
from experiments.faithful.deem import PublishedDeem

from ..parity_weights import parity_tower_config, tower_weights
from .official_labels import make_labels
from .test_parity import (
    START,
    VALUES,
    f5_inputs,
    normalised,
    parity_model,
)

BOS, EOS, PAD, SLOT, SLOTS = 1, 2, 99, 101, 3
PICTURE = [START] + [SLOT] * SLOTS


def random_document(rng: random.Random) -> list[int]:
    """A document as the official collators make them; it may be of pictures or text alone, and end in a picture."""
    parts = [PICTURE if rng.random() < 0.5 else [rng.randrange(3, 99) for _ in range(rng.randrange(1, 4))]]
    parts += [PICTURE if rng.random() < 0.4 else [rng.randrange(3, 99)] for _ in range(rng.randrange(5))]
    return [BOS, *(token for part in parts for token in part), *([EOS] if rng.random() < 0.7 else [])]


def random_batch(seed: int):
    """Rows of one to three packed documents, padded on a random side; ids, mask and document numbers."""
    rng = random.Random(seed)
    rows = [[random_document(rng) for _ in range(rng.randrange(1, 4))] for _ in range(rng.randrange(1, 4))]
    width = max(sum(map(len, row)) for row in rows) + rng.randrange(2)
    ids, mask, numbers = [], [], []
    for row in rows:
        tokens = [token for document in row for token in document]
        belong = [number for number, document in enumerate(row) for _ in document]
        padding = width - len(tokens)
        before = padding if rng.random() < 0.5 else 0
        ids.append([PAD] * before + tokens + [PAD] * (padding - before))
        mask.append([0] * before + [1] * len(tokens) + [0] * (padding - before))
        numbers.append([-1] * before + belong + [-1] * (padding - before))
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(numbers)


@pytest.mark.parametrize("seed", range(25))
def test_labels_places_contexts_and_what_is_seen_are_those_of_an_oracle(seed):
    """The rules of the official code as prose, over every token in loops."""
    ids, mask, numbers = random_batch(seed)
    starts = il.row_starts(ids, mask, numbers)
    labels = make_labels(ids, mask, bos_token_id=BOS, image_token_id=SLOT, image_start_token_id=START)
    behind = make_labels(ids, mask, bos_token_id=BOS, image_token_id=SLOT, image_start_token_id=START, after=START)
    visible = il.visible_images(ids, starts, START, SLOT)
    rows, places = il.image_places(ids, START)
    previous = il.previous_images(rows, places, starts[rows, places])
    states, counts = il.reversed_contexts(ids[..., None].float(), rows, places, starts[rows, places])

    images = []  # (row, place of the start)
    for row, tokens in enumerate(ids.tolist()):
        begin, shown, own = 0, [], []
        for place, token in enumerate(tokens):
            real = mask[row, place] == 1
            if real and token == BOS:
                begin, shown = place, []
            if token == START:
                images.append((row, place))
                expected = shown[-1] if shown else -1
                index = len(images) - 1
                assert previous[index] == expected
                context = tokens[begin : place + 1][::-1]
                assert states[index, : len(context), 0].tolist() == context and counts[index].sum() == len(context)
                shown.append(index)
                own.append(index)
            learned = real and token not in (BOS, SLOT) and not (token == START and tokens[place - 1] == BOS)
            assert labels[row, place] == (token if learned else -100)
            assert behind[row, place] == (token if learned and shown else -100)
            if real:
                # An image is seen from its first slot on, by its own document.
                seen = [index for index in shown if images[index][1] < place]
                first = len(images) - len(own)
                assert visible[row, place].nonzero().flatten().tolist() == [index - first for index in seen]
    assert list(zip(rows.tolist(), places.tolist(), strict=True)) == images


def by_the_official_rule(region_masks, height, width):
    """A patch belongs to the region when what lies around its middle does; small regions come out empty."""
    resized = interpolate(region_masks.float(), (height, width), mode="bilinear", align_corners=False)
    return (resized > 0).float().flatten(1)[..., None]


@pytest.fixture
def official_rule(monkeypatch):
    for module in ("vision.grids", "vision.tower", "vision.region_tokens", "models.denoising"):
        monkeypatch.setattr(f"deem_plugin.{module}.region_to_patches", by_the_official_rule)


def test_raw_masks_give_the_official_queries_by_the_official_rule(shared_dir, official_rule):
    partial = load_file(shared_dir / "parity/f2_partial_mmfs_random.safetensors")
    full = load_file(shared_dir / "parity/f2_full.safetensors")
    tower = DeemVisionTower(DeemVisionConfig(**parity_tower_config())).eval()
    tower.load_state_dict(tower_weights(load_file(shared_dir / "parity/f2_weights.safetensors")), strict=True)

    output = tower(full["image_normalised"], region_masks=partial["input.image_mask"])

    torch.testing.assert_close(output.last_hidden_state, partial["perceiver_out"], **VALUES)
    cells = by_the_official_rule(partial["input.image_mask"], 16, 16)
    assert torch.equal(cells[..., 0], partial["latent_image_mask"].flatten(1).float())


def reading_of(f5, model, **changes):
    """What the losses of the diffusion model are made of, for the official inputs."""
    inputs = f5_inputs(f5, model)
    output = model(**{name: value for name, value in inputs.items() if name != "labels"})
    given = {
        "input_ids": inputs["input_ids"],
        "starts": il.row_starts(inputs["input_ids"], None, inputs["document_ids"]),
        "hidden_states": output.last_hidden_state,
        "image_tokens": output.image_tokens,
        "maps": output.maps,
        "pictures": f5["image_tensors_dec"],
        "region_masks": inputs["region_masks"],
        "totals": model.totals_of(inputs | changes),
    }
    return DenoisingBatch(**given | changes)


@pytest.fixture(scope="module")
def official(weights, diffusion_model):
    return parity_model(weights, diffusion_model, PublishedDeem, feedback_maps=True).eval()


@pytest.mark.parametrize("learned", [[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]])
def test_pictures_that_are_not_to_be_learned_stay_in_the_official_mean(official, f5, draws, learned):
    """The official errors of each picture, times the masks, over all of them; ours is over those that count."""
    mask = torch.tensor(learned)
    reading = reading_of(f5, official, image_loss_mask=mask)
    errors = f5["call1.sd_loss"].flatten(1).mean(1)
    # Only the second row begins with a picture: it has nothing before it but `bos`.
    valid = mask * torch.tensor([1, 1, 0, 1])
    if il.image_places(reading.input_ids, START)[1].tolist()[3] == 16:  # the packed document of row 1 begins at 15
        valid[3] = 0

    theirs = official.denoising.image_loss(reading, draws["image"])
    inputs = f5_inputs(f5, official) | {"image_loss_mask": mask}
    reading.totals = totals_of(official.config, inputs)
    ours = official.denoising.image_loss(reading, draws["image"])

    assert theirs.item() == pytest.approx((errors * valid).sum().item() / 4, abs=1e-5)
    assert ours.item() == pytest.approx((errors * valid).sum().item() / max(int(valid.sum()), 1), abs=1e-5)


def test_pictures_normalised_twice_are_what_the_next_image_differs_by(official, f5, f5_summary, draws):
    """With the pictures normalised once, everything else as official: as their code would be with that line right."""
    reading = reading_of(f5, official)
    twice = official.denoising.image_loss(reading, draws["image"])
    once = DenoisingHeads.image_loss(official.denoising, reading, draws["image"])

    assert twice.item() == pytest.approx(f5_summary["cases"]["as_is"]["loss_img"], abs=1e-5)
    assert 0 < abs(twice.item() - once.item()) < 1e-2
    # The line right means that the diffusion model is shown pictures in [0, 1]: those of the feedback, which comes
    # first.
    before = f5["call0.image_in"]
    torch.testing.assert_close(before, f5["image_tensors_dec"])


def test_a_region_that_comes_out_empty_is_a_loss_of_zero_by_the_official_rule(
    official,
    f5,
    draws,
    official_rule,
):
    """Of four pictures one with a mask of zeros: the sum of the three others over four."""
    masks = torch.ones(4, 1, 64, 64)
    masks[2] = 0
    whole = reading_of(f5, official, region_masks=torch.ones(4, 1, 64, 64))
    errors = []
    for index in range(4):
        alone = torch.ones(4, 1, 64, 64)
        alone[[other for other in range(4) if other != index]] = 0
        whole.region_masks = alone
        errors.append(official.denoising.feedback_loss(whole, draws["feedback"]).total.item() / 4)
    whole.region_masks = masks

    loss = official.denoising.feedback_loss(whole, draws["feedback"])

    assert min(errors) > 0.1 and loss.counted.tolist() == [True, True, False, True]
    assert loss.total.item() / 4 == pytest.approx(errors[0] + errors[1] + errors[3], abs=1e-5)


def test_rows_padded_on_the_left_and_a_row_without_images_read_as_by_themselves(weights, f4):
    model = parity_model(weights).eval()
    pixel_values = normalised(f4["image_tensors"], model.config.vision_config)
    ids = f4["text_ids"][0, :29]
    text = torch.tensor([BOS, 7, 8, 9, 10, EOS])
    both = torch.full((2, 33), PAD)
    mask = torch.zeros_like(both)
    both[0, 4:], mask[0, 4:] = ids, 1
    both[1, -6:], mask[1, -6:] = text, 1

    together = model(both, mask, pixel_values=pixel_values[:2]).last_hidden_state

    alone = model(ids[None], torch.ones(1, 29), pixel_values=pixel_values[:2]).last_hidden_state
    torch.testing.assert_close(together[0, 4:], alone[0], **VALUES)
    torch.testing.assert_close(alone[0], f4["mm_hidden_state"][0, :29], **VALUES)
    # Without pictures at all the synchroniser is not even attached; with them elsewhere in the batch it sees none, and
    # gives its biases, as in the official code.
    batch = torch.cat([both[1:, -6:], both[1:, -6:]])
    assert torch.isfinite(together).all()
    plain = model(batch, torch.ones_like(batch)).last_hidden_state
    assert torch.equal(plain[0], plain[1])


def test_a_null_context_that_safetensors_has_kept_under_its_other_name_is_found(weights):
    """It is one parameter under two names, of which a safetensors file holds one."""
    expected = weights["image_decoder.neg_prompt_embeds"]
    kept = {name: value for name, value in weights.items() if name != "image_decoder.neg_prompt_embeds"}

    conversion = convert_state_dict(kept, START)

    assert torch.equal(conversion.weights["denoising.image_decoder.null_context"], expected)
    assert conversion.renamed["visual_tokenizer.neg_prompt_embeds"] == "denoising.image_decoder.null_context"
    assert conversion.renamed.keys() | conversion.ignored.keys() == kept.keys()
