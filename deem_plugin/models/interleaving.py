"""Where pictures stand in a row of tokens, and what follows from it. Pure functions, checked against fixture F4."""

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

IGNORE_INDEX = -100


def row_starts(input_ids, attention_mask=None, document_ids=None):
    """
    Returns for each token where its document begins in its row, shape `(batch, tokens)`.

    Args:
        input_ids (`torch.Tensor`): Shape `(batch, tokens)`.
        attention_mask (`torch.Tensor`, *optional*): Zero at padding; a row then begins at its first other token.
        document_ids (`torch.Tensor`, *optional*): Numbers of packed documents; without them a row is one document.
    """
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    if document_ids is not None:
        return positions - positions_in_documents(document_ids)
    if attention_mask is None:
        return torch.zeros_like(positions)
    return attention_mask.long().argmax(dim=1, keepdim=True).expand_as(positions)


def positions_in_documents(document_ids):
    """Returns positions that start anew at each packed document, shape of `document_ids` `(batch, tokens)`."""
    positions = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return positions - positions.masked_fill(~begins, 0).cummax(dim=1).values


def positions_behind_padding(attention_mask):
    """Returns positions from the first token of each row on, 0 before it, shape of the mask `(batch, tokens)`."""
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (places - attention_mask.long().argmax(1, keepdim=True)).clamp(min=0)


def count_documents(input_ids, document_ids=None):
    """Returns how many documents a batch holds, an integer `()`; without `document_ids` each row is one."""
    if document_ids is None:
        return torch.as_tensor(len(input_ids), device=input_ids.device)
    begins = positions_in_documents(document_ids) == 0
    return (begins & (document_ids >= 0)).sum()


def fill_image_slots(embeddings, input_ids, image_token_id, images):
    """
    Puts the tokens of pictures into their slots.

    Args:
        embeddings (`torch.Tensor`): Of all tokens, shape `(batch, tokens, dim)`. Not changed.
        input_ids (`torch.Tensor`): Shape `(batch, tokens)`.
        image_token_id (`int`): Id of an image slot.
        images (`torch.Tensor`): In reading order, shape `(images, slots, dim)`.

    Raises:
        ValueError: If there are not as many slots as tokens of pictures.
    """
    slots = input_ids == image_token_id
    if int(slots.sum()) != images.shape[0] * images.shape[1]:
        raise ValueError(
            f"The text has {int(slots.sum())} image slots, but {images.shape[0]} pictures of {images.shape[1]} tokens "
            f"fill {images.shape[0] * images.shape[1]}. Give one picture for each mark, and make the inputs with the "
            f"processor of this model."
        )
    return embeddings.masked_scatter(slots[..., None], images.to(embeddings.dtype))


def image_places(input_ids, image_start_token_id):
    """Returns row and position of each image start in reading order, two tensors of shape `(images,)`."""
    return (input_ids == image_start_token_id).nonzero(as_tuple=True)


def has_picture(input_ids, rows, places, image_token_id):
    """Tells of each image start whether slots follow, `(images,)`; a picture that is yet to be drawn has none."""
    following = (places + 1).clamp(max=input_ids.shape[1] - 1)
    return (input_ids[rows, following] == image_token_id) & (following > places)


def visible_images(input_ids, starts, image_start_token_id, image_token_id):
    """
    Tells which pictures of its row each token can attend to: those of its own document that began before it.

    Args:
        input_ids (`torch.Tensor`): Shape `(batch, tokens)`.
        starts (`torch.Tensor`): Where the document of each token begins, see `row_starts`; same shape.
        image_start_token_id, image_token_id (`int`): Ids of the token before the slots of a picture, and of a slot.

    Returns:
        `torch.Tensor`: Boolean, shape `(batch, tokens, most images of a row)`.
    """
    rows, places = image_places(input_ids, image_start_token_id)
    read = has_picture(input_ids, rows, places, image_token_id)
    rows, places = rows[read], places[read]
    counts = torch.bincount(rows, minlength=len(input_ids))
    first_slots = pad_sequence(torch.split(places + 1, counts.tolist()), batch_first=True, padding_value=-1)
    first_slots = first_slots[:, None, :]  # (batch, 1, images)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None, :, None]
    return (first_slots > starts[..., None]) & (first_slots <= positions) & (first_slots != -1)


def previous_images(rows, places, starts):
    """
    Finds for each picture the one directly before it in the same document.

    Args:
        rows, places (`torch.Tensor`): Of each picture, see `image_places`.
        starts (`torch.Tensor`): Position in its row where the document of each picture begins, shape `(images,)`.

    Returns:
        `torch.Tensor`: Index of the picture before, -1 where there is none, shape `(images,)`.
    """
    before = torch.arange(len(rows), device=rows.device) - 1
    if len(rows) == 0:
        return before
    same = (rows[before] == rows) & (places[before] >= starts)
    same[0] = False
    return torch.where(same, before, -1)


def reversed_contexts(hidden_states, rows, places, starts):
    """
    Cuts out what stands before each picture, the nearest first.

    Args:
        hidden_states (`torch.Tensor`): Of the language model, shape `(batch, tokens, dim)`.
        rows, places, starts (`torch.Tensor`): As in `previous_images`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: From the image start back to the document's first token, shape
        `(images, longest, dim)`, zero behind its end; and the mask `(images, longest)`, True where a token counts.
    """
    contexts = [
        hidden_states[row, start : place + 1].flip(0)
        for row, place, start in zip(rows.tolist(), places.tolist(), starts.tolist(), strict=True)
    ]
    lengths = places - starts + 1
    padded = pad_sequence(contexts, batch_first=True) if contexts else hidden_states[:0, :0]
    return padded, torch.arange(padded.shape[1], device=places.device) < lengths[:, None]


def by_rows(maps, counts):
    """
    Arranges maps of images by the rows of tokens that show them.

    Args:
        maps (`list[torch.Tensor]`): Each `(images, dim, height, width)`, in reading order.
        counts (`list[int]`): Images of each row.

    Returns:
        `list[torch.Tensor]`: Each `(rows, most images of a row, dim, height, width)`, zero where a row has fewer.
    """
    most = max(counts)
    return [
        torch.stack([F.pad(own, (0, 0) * 3 + (0, most - len(own))) for own in torch.split(level, counts)])
        for level in maps
    ]
