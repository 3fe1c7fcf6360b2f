"""Weights of the authors' code (MM-Interleaved has the same names), renamed to ours; every key accounted for."""

import re
from dataclasses import dataclass, field

import torch

from ..vision.grids import sincos_position_embedding
from .synchroniser_names import synchroniser_weights

_RESAMPLER = [
    (r"blip2qformer\.layernorm\.", "norm."),
    (r"blip2qformer\.encoder\.layer\.(\d+)\.", r"layers.\1."),
    (r"\.attention\.attention\.", ".self_attention."),
    (r"\.crossattention\.attention\.", ".cross_attention."),
    (r"\.attention\.output\.dense\.", ".self_attention.out."),
    (r"\.attention\.output\.LayerNorm\.", ".self_attention.norm."),
    (r"\.crossattention\.output\.dense\.", ".cross_attention.out."),
    (r"\.crossattention\.output\.LayerNorm\.", ".cross_attention.norm."),
    (r"\.intermediate_query\.dense\.", ".feed_forward.up."),
    (r"\.output_query\.dense\.", ".feed_forward.down."),
    (r"\.output_query\.LayerNorm\.", ".feed_forward.norm."),
]

# First match wins; what follows the match is kept.
_RENAMED = [
    (r"^visual_tokenizer\.sniffer\.vision_model\.visual\.trunk\.", "vision_tower.encoder.trunk."),
    (r"^visual_tokenizer\.sniffer\.vision_model\.adapter_cls\.", "vision_tower.encoder.class_adapter."),
    (r"^visual_tokenizer\.pos_proj\.", "vision_tower.position_proj."),
    (r"^visual_tokenizer\.pos_ln\.", "vision_tower.position_norm."),
    (r"^visual_tokenizer\.post_ln\.", "vision_tower.input_norm."),
    (r"^visual_tokenizer\.perceiver_resampler\.", "vision_tower.resampler."),
    (r"^visual_tokenizer\.feature_extractor\.mask_feat_linear\.", "vision_tower.region_tokens.features."),
    (r"^visual_tokenizer\.feature_extractor\.mask_linear\.layers\.0\.", "vision_tower.region_tokens.shape.0."),
    (r"^visual_tokenizer\.feature_extractor\.mask_linear\.layers\.1\.", "vision_tower.region_tokens.shape.2."),
    (r"^visual_tokenizer\.feature_extractor\.mask_linear\.layers\.2\.", "vision_tower.region_tokens.shape.4."),
    (r"^visual_tokenizer\.proj_t\.", "connector."),
    (r"^visual_tokenizer\.proj_i\.", "feedback_head."),
    (r"^image_decoder\.perceiver_resampler\.", "image_decoder.resampler."),
    (r"^image_decoder\.neg_prompt_embeds$", "image_decoder.null_context"),
    (r"^context_feat_proj\.", "image_decoder.projection."),
    (r"^mm_decoder\.(?!embed_tokens\.)", "language_model.model."),
]
_ADAPTER = re.compile(r"^visual_tokenizer\.sniffer\.vision_model\.adapter_c([2-5])\.")

# What has no place in our model, and why.
_IGNORED = [
    (r"^visual_tokenizer\.encoder\.(unet|vae)\.", "the frozen diffusion model, which is loaded from its own folder"),
    (r"^visual_tokenizer\.pos_embed$", "a fixed sine-cosine embedding, which is computed"),
    (r"^visual_tokenizer\.clip_(mean|std)$", "the normalisation, which the image processor has"),
    (r"^visual_tokenizer\.neg_prompt_embeds$", "the null context, which `image_decoder.neg_prompt_embeds` holds too"),
    (r"^visual_tokenizer\.sniffer\.vision_model\.visual\.head\.", "CLIP's projection, which nothing of DEEM reads"),
    (r"\.rotary_emb\.inv_freq$", "frequencies, which are computed"),
]
# Made in every official model, and of no use in one that was trained without a diffusion model (the third stage).
_HEADS_OF_A_DIFFUSION_MODEL = re.compile(r"^(visual_tokenizer\.proj_i|context_feat_proj)\.")
# One parameter under two names, of which a safetensors file keeps either.
_NULL = "neg_prompt_embeds"
_SHARED_NULL = f"visual_tokenizer.{_NULL}"
# What becomes rows of our own new tokens.
_VOCABULARY = (
    "mm_decoder.embed_tokens.weight",
    "soi_token",
    "text_decoder.head.weight",
    "text_decoder.head.bias",
    "text_decoder.head_new.weight",
    "text_decoder.head_new.bias",
)


@dataclass
class Conversion:
    """
    A converted checkpoint, and what became of each key of the original.

    Args:
        weights (`dict[str, torch.Tensor]`): State dict of a [`DeemForConditionalGeneration`].
        renamed (`dict[str, str]`): Official name to ours.
        ignored (`dict[str, str]`): Official name to the reason.
    """

    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """Returns a few lines for a reader: how many keys were used, and what was ignored for which reason."""
        reasons: dict[str, int] = {}
        for reason in self.ignored.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        lines = [f"{len(self.renamed)} weights used, {len(self.ignored)} ignored:"]
        return "\n".join(lines + [f"  {count}: {reason}" for reason, count in reasons.items()])


def convert_state_dict(official: dict[str, torch.Tensor], image_start_token_id: int) -> Conversion:
    """
    Renames the weights of a model that was trained with the authors' code.

    Args:
        official (`dict[str, torch.Tensor]`): State dict of their `MMInterleaved`.
        image_start_token_id (`int`): Id of the image start (`soi`): 32000 with Vicuna.

    Raises:
        ValueError: If a key has no place and no reason to be left out, or a weight that we compute has another value.
    """
    synchronisers = synchroniser_weights(official)
    result = Conversion(dict(synchronisers.weights), dict(synchronisers.renamed), dict(synchronisers.ignored))
    draws = any(name.startswith("image_decoder.") for name in official)
    left_over = []
    for name, value in official.items():
        if name in _VOCABULARY or name in result.renamed or name in result.ignored:
            continue
        if name == _SHARED_NULL and draws and f"image_decoder.{_NULL}" not in official:
            result.weights["image_decoder.null_context"] = value
            result.renamed[name] = "image_decoder.null_context"
        elif reason := next((why for pattern, why in _IGNORED if re.search(pattern, name)), None):
            result.ignored[name] = reason
        elif not draws and _HEADS_OF_A_DIFFUSION_MODEL.match(name):
            result.ignored[name] = "a head for a diffusion model, which this model was trained without"
        elif (ours := rename(name)) is not None:
            result.weights[ours] = value
            result.renamed[name] = ours
        else:
            left_over.append(name)
    if left_over:
        raise ValueError(
            f"{len(left_over)} of {len(official)} weights have no place in a DeemForConditionalGeneration, among them "
            f"{', '.join(left_over[:5])}. Expected the state dict of the authors' MMInterleaved with a ConvNeXt."
        )
    _check_computed(official)
    _convert_vocabulary(official, image_start_token_id, result)
    return result


def rename(name: str) -> str | None:
    """Returns our name of an official weight that is taken as it is; `None` for any other."""
    if match := _ADAPTER.match(name):  # the official names count from the stride: c2 has 2**2, c5 has 2**5
        return f"vision_tower.encoder.adapters.{int(match[1]) - 2}.{name[match.end() :]}"
    for pattern, ours in _RENAMED:
        if match := re.match(pattern, name):
            name = ours + name[match.end() :]
            if ".resampler." in name:
                for old, new in _RESAMPLER:
                    name = re.sub(old, new, name)
            return name
    return None


def _check_computed(official):
    """Raises if a checkpoint has other values for what our code computes, or two values for one weight."""
    positions = official.get("visual_tokenizer.pos_embed")
    if positions is not None:
        side = round((len(positions) - 1) ** 0.5)
        computed = sincos_position_embedding(positions.shape[1], side, side)
        if not torch.allclose(positions[1:].float(), computed, atol=1e-4) or positions[0].any():
            raise ValueError(
                "`visual_tokenizer.pos_embed` is not the fixed 2-D sine-cosine embedding with a zero class row. Was "
                "it trained? This project computes the embedding and has no place for another."
            )
    twins = [official.get(f"{part}.neg_prompt_embeds") for part in ("visual_tokenizer", "image_decoder")]
    if None not in twins and not torch.equal(*twins):
        raise ValueError(
            "`visual_tokenizer.neg_prompt_embeds` and `image_decoder.neg_prompt_embeds` differ, though they are one "
            "parameter under two names. The checkpoint is damaged or was put together from two."
        )


def _convert_vocabulary(official, image_start_token_id, result):
    """
    Splits embedding and head into the language model's own rows and those of the new tokens.

    The official head has rows of zeros with a bias of -100 for new tokens and adds a second, trained head to them; the
    image start has a trained vector that is added to its frozen embedding. Ours are the sums.
    """
    missing = [name for name in _VOCABULARY if name not in official]
    if missing:
        raise ValueError(f"The checkpoint lacks {', '.join(missing)}; expected the whole model, not a part of it.")
    embeddings, start, head, bias, new_head, new_bias = (official[name] for name in _VOCABULARY)
    known = len(embeddings) - len(new_head)
    if bias[:known].any():
        raise ValueError("`text_decoder.head.bias` is not zero for the language model's own tokens, which have none.")
    new_embeddings = embeddings[known:].clone()
    new_embeddings[image_start_token_id - known] += start[0]
    result.weights |= {
        "language_model.model.embed_tokens.weight": embeddings[:known],
        "language_model.lm_head.weight": head[:known],
        "new_embeddings.weight": new_embeddings,
        "new_head.weight": head[known:] + new_head,
        "new_head.bias": bias[known:] + new_bias,
    }
    result.renamed |= {
        "mm_decoder.embed_tokens.weight": "language_model.model.embed_tokens.weight and new_embeddings.weight",
        "soi_token": "new_embeddings.weight",
        "text_decoder.head.weight": "language_model.lm_head.weight and new_head.weight",
        "text_decoder.head.bias": "new_head.bias",
        "text_decoder.head_new.weight": "new_head.weight",
        "text_decoder.head_new.bias": "new_head.bias",
    }
