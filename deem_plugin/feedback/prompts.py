"""The states of a fixed text, to which methods made for text-to-image diffusion models add the visual tokens."""

import torch

from ..hub import at_revision


@torch.no_grad()
def prompt_states(path_or_id, prompt, context_dim):
    """
    Returns what the text encoder of a Stable Diffusion 1.x or 2.x says of a prompt, `(77, context_dim)`, float32. It
    is loaded, asked once and forgotten: a constant needs no network.

    Raises:
        ValueError: If the diffusion model has no text encoder whose states are `context_dim` wide.
    """
    from transformers import AutoTokenizer, CLIPTextModel

    try:
        tokenizer = AutoTokenizer.from_pretrained(**at_revision(path_or_id), subfolder="tokenizer")
        encoder = CLIPTextModel.from_pretrained(
            **at_revision(path_or_id), subfolder="text_encoder", use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`feedback.condition.prompt` needs the diffusion model's own text encoder, and `{path_or_id}` has no "
            f"CLIP `text_encoder` with a `tokenizer` that can be loaded ({error}). Leave `prompt` out, or give the "
            f"whole folder of a Stable Diffusion."
        ) from error
    width = encoder.config.hidden_size
    if width != context_dim:
        raise ValueError(
            f"The text encoder of `{path_or_id}` gives states of width {width}, but the denoiser attends to width "
            f"{context_dim}: it reads more than one encoder. Leave `feedback.condition.prompt` out for this diffusion "
            f"model."
        )
    inputs = tokenizer(
        prompt,
        padding="max_length",
        max_length=encoder.config.max_position_embeddings,
        truncation=True,
        return_tensors="pt",
    )
    return encoder.eval()(inputs.input_ids).last_hidden_state[0].float()
