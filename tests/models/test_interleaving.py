"""Places of pictures, labels and contexts, against the authors' tensors (F4) and on rows that F4 does not have."""

import json

import pytest
import torch
from safetensors.torch import load_file

from deem_plugin.models import interleaving as il

from .official_labels import latest_places, make_labels

VALUES = {"atol": 1e-5, "rtol": 1e-5}
BOS, IMAGE, START = 1, 101, 100
IDS = {"bos_token_id": BOS, "image_token_id": IMAGE, "image_start_token_id": START}


@pytest.fixture(scope="module")
def case(shared_dir):
    return load_file(shared_dir / "parity/f4_interleave.safetensors")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain", {}),
        ("offset_int3", {"prompt_lengths": [3, 3]}),
        ("offset_list_14_2", {"prompt_lengths": [14, 2]}),
        ("laion_ignore_noimage", {"after": START}),
    ],
)
def test_labels_are_the_official_ones(case, shared_dir, name, options):
    shifted = json.loads((shared_dir / "parity/f4_labels.json").read_text())["labels_shifted_left_by_one"][name]

    labels = make_labels(case["text_ids"], case["attention_mask"], **IDS, **options)

    assert labels[:, 1:].tolist() == shifted
    assert (labels[:, 0] == -100).all()


def test_pictures_fill_their_slots_and_the_start_is_added_by_the_embedding(case):
    embeddings = case["text_embeds"].clone()
    embeddings[case["text_ids"] == START] += case["soi_token"][0]

    filled = il.fill_image_slots(embeddings, case["text_ids"], IMAGE, case["vis_embed"])

    torch.testing.assert_close(filled, case["mm_embeds"], **VALUES)
    with pytest.raises(ValueError, match="32 image slots, but 3 pictures of 8 tokens fill 24"):
        il.fill_image_slots(embeddings, case["text_ids"], IMAGE, case["vis_embed"][:3])


def test_a_token_sees_the_pictures_of_its_own_document_that_began_before_it(case):
    visible = il.visible_images(case["text_ids"], latest_places(case["text_ids"], BOS), START, IMAGE)

    assert torch.equal(visible.float(), case["cross_attention_mask"])
    none = il.visible_images(torch.tensor([[BOS, 5, 6]]), torch.zeros(1, 3), START, IMAGE)
    assert none.shape == (1, 3, 0)


@pytest.mark.parametrize("documents", ["bos", "none"])
def test_contexts_run_back_to_the_start_of_the_document(case, documents):
    from deem_plugin.models.image_decoder import ImageDecoder

    from .test_parity import parity_config

    rows, places = il.image_places(case["text_ids"], START)
    starts = case["nearest_bos_idxs"] if documents == "bos" else torch.zeros_like(places)
    if documents == "bos":
        assert torch.equal(latest_places(case["text_ids"], BOS)[rows, places], starts)
    decoder = ImageDecoder(parity_config())
    decoder.projection.load_state_dict(
        {"weight": case["context_feat_proj.weight"], "bias": case["context_feat_proj.bias"]}
    )

    states, mask = il.reversed_contexts(case["mm_hidden_state"], rows, places, starts)

    assert torch.equal(mask.long(), case[f"ctx.{documents}.mask"])
    torch.testing.assert_close(decoder.positioned(states), case[f"ctx.{documents}.features"], **VALUES)
    previous = il.previous_images(rows, places, starts)
    assert torch.equal((previous >= 0).long()[:, None], case[f"mmfs_dec.{documents}.mask"])
    maps = case["multiscale_features.2"]
    expected = torch.where((previous >= 0)[:, None, None, None], maps[previous], torch.zeros_like(maps))
    torch.testing.assert_close(expected[:, None], case[f"mmfs_dec.{documents}.feat2"], **VALUES)


def test_left_padding_and_documents_without_a_first_token_begin_with_the_row():
    input_ids = torch.tensor([[0, 0, BOS, 5, START, IMAGE, 6], [7, START, IMAGE, 8, BOS, START, IMAGE]])
    attention_mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])

    starts = il.row_starts(input_ids, document_ids=torch.tensor([[-1, -1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1]]))
    visible = il.visible_images(input_ids, starts, START, IMAGE)
    labels = make_labels(input_ids, attention_mask, **IDS)

    assert starts.tolist() == [[0, 0, 2, 2, 2, 2, 2], [0, 0, 0, 0, 4, 4, 4]]
    assert il.row_starts(input_ids, attention_mask).tolist() == [[2] * 7, [0] * 7]
    assert visible[0, :, 0].tolist() == [False] * 5 + [True] * 2
    assert visible[1, :, 0].tolist() == [False] * 2 + [True] * 2 + [False] * 3
    assert visible[1, :, 1].tolist() == [False] * 6 + [True]
    assert labels[0].tolist() == [-100, -100, -100, 5, START, -100, 6]
    padded = make_labels(input_ids, torch.ones_like(attention_mask), **IDS, pad_token_id=0)
    assert torch.equal(padded, labels)
    assert labels[1].tolist() == [7, START, -100, 8, -100, -100, -100]
    with pytest.raises(ValueError, match="3 prompt lengths for 2 rows"):
        make_labels(input_ids, attention_mask, **IDS, prompt_lengths=[1, 2, 3])


def test_a_picture_that_is_yet_to_be_drawn_is_not_looked_at():
    input_ids = torch.tensor([[BOS, START, IMAGE, IMAGE, 5, START], [BOS, 6, START, IMAGE, IMAGE, START]])
    rows, places = il.image_places(input_ids, START)

    assert il.has_picture(input_ids, rows, places, IMAGE).tolist() == [True, False, True, False]
    visible = il.visible_images(input_ids, torch.zeros_like(input_ids), START, IMAGE)
    assert visible.shape == (2, 6, 1)
    assert visible[:, :, 0].tolist() == [[False, False, True, True, True, True], [False] * 3 + [True] * 3]


def test_no_picture_gives_empty_places():
    rows, places = il.image_places(torch.tensor([[BOS, 5, 6]]), START)

    assert len(rows) == len(il.previous_images(rows, places, places)) == 0
