"""The labels of next-token prediction by the rules of the official code, checked against its fixtures."""

import torch

from deem_plugin.models.interleaving import IGNORE_INDEX


def latest_places(input_ids, token_id):
    """Returns for each token the place of the latest `token_id` up to it, -1 before the first, `(batch, tokens)`."""
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    return positions.masked_fill(input_ids != token_id, -1).cummax(dim=1).values


def make_labels(
    input_ids,
    attention_mask,
    *,
    bos_token_id,
    image_token_id,
    image_start_token_id,
    pad_token_id=None,
    prompt_lengths=None,
    after=None,
):
    """
    Makes the labels of next-token prediction by the official rules.

    Nothing is learned of padding, of image slots, of `bos`, of the prompt, and of an image start that follows `bos`
    directly (nothing could tell that a picture comes). An image start after text is learned: that is how the model
    learns to draw. The last image slot predicts the first token of the text behind the picture.

    Args:
        input_ids, attention_mask (`torch.Tensor`): Shape `(batch, tokens)`.
        bos_token_id, image_token_id, image_start_token_id (`int`): Ids of the special tokens.
        pad_token_id (`int`, *optional*): Id of padding that the mask does not tell of.
        prompt_lengths (`list[int]`, *optional*): For each row the number of its first tokens that are prompt.
        after (`int`, *optional*):
            A token id: text of a document is learned from its first such token on only. With the image start, text
            that no picture goes before is left out.

    Returns:
        `torch.Tensor`: Token ids and -100, shape `(batch, tokens)`. As everywhere in transformers `labels[i]` is the
        token at `i`; the model shifts.
    """
    labels = input_ids.clone()
    ignored = (attention_mask == 0) | (input_ids == image_token_id) | (input_ids == bos_token_id)
    if pad_token_id is not None:
        ignored |= input_ids == pad_token_id
    follows_bos = torch.zeros_like(ignored)
    follows_bos[:, 1:] = input_ids[:, :-1] == bos_token_id
    ignored |= follows_bos & (input_ids == image_start_token_id)
    if prompt_lengths is not None:
        if len(prompt_lengths) != len(input_ids):
            raise ValueError(f"Got {len(prompt_lengths)} prompt lengths for {len(input_ids)} rows; expected one each.")
        lengths = torch.as_tensor(prompt_lengths, device=input_ids.device)
        ignored |= torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]
    if after is not None:
        seen = latest_places(input_ids, after)
        ignored |= (seen < latest_places(input_ids, bos_token_id).clamp(min=0)) | (seen == -1)
    return labels.masked_fill(ignored, IGNORE_INDEX)
