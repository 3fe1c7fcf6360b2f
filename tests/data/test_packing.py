import random

import pytest

from deem_plugin.data.packing import Packer, TokenDocument

PAD, BOS, START, SLOT = 0, 1, 2, 3


def packer(length=8):
    return Packer(length, image_token_id=SLOT, image_start_token_id=START, pad_token_id=PAD)


def text(length):
    return TokenDocument([BOS] + [9] * (length - 1), [])


def test_documents_fill_rows_in_order():
    first = TokenDocument([BOS, START, SLOT, SLOT, 9], ["a"])
    second = TokenDocument([BOS, 8, 8], [])
    third = TokenDocument([BOS, 7, START, SLOT, SLOT], ["b"])
    packing = packer()

    rows = list(packing.pack([first, second, third]))

    assert rows[0].input_ids == [BOS, START, SLOT, SLOT, 9, BOS, 8, 8]
    assert rows[0].document_ids == [0, 0, 0, 0, 0, 1, 1, 1]
    assert rows[1].input_ids == [BOS, 7, START, SLOT, SLOT, PAD, PAD, PAD]
    assert rows[1].document_ids == [0, 0, 0, 0, 0, -1, -1, -1]
    assert [row.images for row in rows] == [["a"], ["b"]]
    assert packing.counts == {"documents": 3, "rows": 2, "padding tokens": 3}


def test_what_does_not_fit_begins_the_next_row():
    rows = list(packer().pack([text(6), text(3)]))

    assert [row.document_ids for row in rows] == [[0] * 6 + [-1] * 2, [0] * 3 + [-1] * 5]


@pytest.mark.parametrize(("before", "kept"), [(3, 8), (4, 4), (6, 6), (7, 7), (8, 8)])
def test_a_long_document_is_cut_before_a_picture_that_does_not_fit(before, kept):
    """The second picture's four slots and its start end at `before + 5`, against a context of 8."""
    document = TokenDocument([BOS] + [9] * (before - 1) + [START] + [SLOT] * 4 + [9] * 4, ["a"])
    packing = packer()

    (row,) = packing.pack([document])

    assert sum(number == 0 for number in row.document_ids) == kept
    whole = before + 5 <= 8
    assert row.images == (["a"] if whole else [])
    assert row.input_ids.count(SLOT) == (4 if whole else 0)
    cut = len(document.input_ids) - kept
    assert (packing.counts["cut documents"], packing.counts["cut tokens"]) == (1, cut)
    assert packing.counts["cut images"] == (not whole)


def test_a_document_that_begins_with_too_large_a_picture_is_dropped_and_counted():
    packing = packer(4)

    rows = list(packing.pack([TokenDocument([START] + [SLOT] * 4, ["a"]), text(2)]))

    assert [row.input_ids for row in rows] == [[BOS, 9, PAD, PAD]]
    assert packing.counts["dropped documents"] == packing.counts["cut images"] == 1


def test_no_token_and_no_picture_is_lost_or_changed_when_all_documents_fit():
    rng = random.Random(0)
    documents = []
    for number in range(200):
        ids, images = [BOS], []
        for picture in range(rng.randrange(4)):
            ids += [9] * rng.randrange(5) + [START] + [SLOT] * 3
            images.append((number, picture))
        documents.append(TokenDocument(ids, images))
    packing = packer(37)

    rows = list(packing.pack(documents))

    assert all(len(row.input_ids) == len(row.document_ids) == 37 for row in rows)
    tokens = [t for row in rows for t, number in zip(row.input_ids, row.document_ids, strict=True) if number >= 0]
    assert tokens == [token for document in documents for token in document.input_ids]
    assert [i for row in rows for i in row.images] == [i for document in documents for i in document.images]
    assert sum(max(row.document_ids) + 1 for row in rows) == 200
    assert not any(name.startswith(("cut", "dropped")) for name in packing.counts)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (TokenDocument([], []), "Document 1 has no tokens"),
        (TokenDocument([BOS, SLOT], ["a"]), "Document 1 has an image slot without an image start at token 1"),
        (TokenDocument([START, 9], ["a"]), "Document 1 has no image slot behind an image start at token 0"),
        (TokenDocument([START, SLOT], []), r"1 image start\(s\) with slots, but brings 0 picture\(s\)"),
    ],
)
def test_what_cannot_be_packed_is_refused_by_number(document, message):
    with pytest.raises(ValueError, match=message):
        list(packer().pack([text(2), document]))


def test_a_context_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match="`length` is 0; expected"):
        packer(0)
