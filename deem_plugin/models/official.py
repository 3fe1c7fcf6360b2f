"""Weights of the authors' code, renamed to ours; every key accounted for."""

import re
from dataclasses import dataclass, field

import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

from ..vision.grids import sincos_position_embedding

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Points a head and a map in the official code, which hard-codes them.
OFFICIAL_POINTS = 8

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
_SYNCHRONISER = [
    (r"\.mmfs_down_blocks\.", ".skip_blocks."),
    (r"\.mmfs_mid_block\.", ".middle_block."),
    (r"\.(?:query_norm|norm1)\.", ".query_norm."),
    (r"\.(?:feat_norm|norm2)\.", ".feature_norm."),
    (r"\.conv\.", ".zero."),
    (r"\.(?:mmfs|attn)\.", ".attention."),
    (r"\.dynamic_offset_mask\.", ".query."),
    (r"\.query_relpos\.", ".image_positions."),
    (r"\.sampling_offsets\.", ".offsets."),
    (r"\.attention_weights\.", ".scores."),
    (r"\.value_proj\.", ".value."),
    (r"\.output_proj\.", ".out."),
    (r"\.ignore_token$", ".null_value"),
]
_OF_UNET = r"^visual_tokenizer\.encoder\.mmfs_module\."
_SNIFFER = r"^visual_tokenizer\.sniffer\.vision_model\."

# Where a name begins, how ours does, and how parts of the rest are called. The first match wins.
_RENAMED = [
    (rf"{_SNIFFER}visual\.trunk\.", "vision_tower.encoder.trunk.", ()),
    (rf"{_SNIFFER}adapter_cls\.", "vision_tower.encoder.class_adapter.", ()),
    # The official names count from the stride: c2 has 2**2, c5 has 2**5.
    *((rf"{_SNIFFER}adapter_c{index + 2}\.", f"vision_tower.encoder.adapters.{index}.", ()) for index in range(4)),
    (r"^visual_tokenizer\.pos_proj\.", "vision_tower.position_proj.", ()),
    (r"^visual_tokenizer\.pos_ln\.", "vision_tower.position_norm.", ()),
    (r"^visual_tokenizer\.post_ln\.", "vision_tower.input_norm.", ()),
    (r"^visual_tokenizer\.perceiver_resampler\.", "vision_tower.resampler.", _RESAMPLER),
    (r"^visual_tokenizer\.feature_extractor\.mask_feat_linear\.", "vision_tower.region_tokens.features.", ()),
    *(
        (
            rf"^visual_tokenizer\.feature_extractor\.mask_linear\.layers\.{index}\.",
            f"vision_tower.region_tokens.shape.{2 * index}.",
            (),
        )
        for index in range(3)
    ),
    (r"^visual_tokenizer\.proj_t\.", "connector.", ()),
    (r"^visual_tokenizer\.proj_i\.", "denoising.feedback_head.", ()),
    (_OF_UNET, "denoising.unet_synchroniser.", _SYNCHRONISER),
    (r"^image_decoder\.perceiver_resampler\.", "denoising.image_decoder.resampler.", _RESAMPLER),
    (r"^(?:image_decoder|visual_tokenizer)\.neg_prompt_embeds$", "denoising.image_decoder.null_context", ()),
    (r"^context_feat_proj\.", "denoising.image_decoder.projection.", ()),
    (r"^mm_decoder\.layers\.(\d+)\.llama_cross_attn\.", r"language_synchroniser.blocks.\1.", _SYNCHRONISER),
    (r"^mm_decoder\.(?!embed_tokens\.)", "language_model.model.", ()),
]

# What has no place in our model, and why.
_IGNORED = [
    (
        r"^visual_tokenizer\.encoder\.(unet|vae)\.",
        "the diffusion model, which is loaded from its own folder; weights do not tell whether it was trained: if it "
        "was, this is lost",
    ),
    (r"^visual_tokenizer\.sniffer\.vision_model\.visual\.head\.", "CLIP's projection, which nothing of DEEM reads"),
    (r"\.rotary_emb\.inv_freq$", "frequencies, which are computed"),
]
_SINES = "the fixed 2-D sine-cosine embedding, which is computed"
_CLIP = "CLIP's normalisation, which the image processor has"
# What our code computes or has as a constant: the value for a weight, or `None` if it cannot have the weight's shape.
_COMPUTED = [
    (r"^visual_tokenizer\.pos_embed$", _SINES, lambda value: _positions(value, class_rows=1)),
    (rf"{_OF_UNET}.*\.pos_embed$", _SINES, lambda value: _positions(value)),
    (rf"{_OF_UNET}.*\.ignore_token$", "zero, which the official code never trains", torch.zeros_like),
    (r"^visual_tokenizer\.clip_mean$", _CLIP, lambda value: torch.tensor(OPENAI_DATASET_MEAN).view(1, 3, 1, 1)),
    (r"^visual_tokenizer\.clip_std$", _CLIP, lambda value: torch.tensor(OPENAI_DATASET_STD).view(1, 3, 1, 1)),
]
# Made in every official model, and of no use in one that was trained without a diffusion model (the third stage).
_HEADS_OF_A_DIFFUSION_MODEL = re.compile(r"^(visual_tokenizer\.proj_i|context_feat_proj)\.")
# One parameter under two names, of which a safetensors file keeps either.
_NULLS = ("image_decoder.neg_prompt_embeds", "visual_tokenizer.neg_prompt_embeds")
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
        weights (`dict[str, torch.Tensor]`): State dict of a [`DeemForConditionalGeneration`], each in its own dtype.
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


def convert_state_dict(official: dict[str, torch.Tensor], vocabulary: int) -> Conversion:
    """
    Renames the weights of a model that was trained with the authors' code.

    Args:
        official (`dict[str, torch.Tensor]`): State dict of their `MMInterleaved`.
        vocabulary (`int`): Tokens of the language model's tokenizer, 32000 with Vicuna. New ones follow.

    Raises:
        ValueError: If a key has no place and no reason to be left out, a weight that we compute has another value, a
            weight is not of finite floating-point numbers, or the vocabulary is another.
    """
    result = convert_names(official)
    known = [name for name in (*result.renamed, *_VOCABULARY) if name in official]
    wrong = [f"{name} ({flaw})" for name in known if (flaw := _flaw(official[name]))]
    if wrong:
        raise ValueError(
            f"{len(wrong)} weights are not of finite floating-point numbers, among them {', '.join(wrong[:5])}. The "
            f"checkpoint is damaged, quantised, or of a run that diverged; give another."
        )
    _convert_vocabulary(official, vocabulary, result)
    return result


def _flaw(value: torch.Tensor) -> str | None:
    """Returns why a tensor is no weight of ours; `None` if it is one."""
    if value.layout is not torch.strided or value.is_meta or value.dtype not in _FLOATS:
        return f"{value.dtype}, {value.layout} on {value.device}"
    bad = int((~value.isfinite()).sum())
    return f"{value.dtype}, {bad} of {value.numel()} not finite" if bad else None


def convert_names(official: dict[str, torch.Tensor]) -> Conversion:
    """Renames all but embedding and head, see `convert_state_dict`; shapes are left to the model that takes them."""
    result = Conversion()
    draws = any(name.startswith("image_decoder.") for name in official)
    left_over = []
    for name, value in official.items():
        if name in _VOCABULARY:
            continue
        if computed := next((row[1:] for row in _COMPUTED if re.search(row[0], name)), None):
            _check_computed(name, value, *computed)
            result.ignored[name] = computed[0]
        elif name == _NULLS[1] and (not draws or _NULLS[0] in official):
            result.ignored[name] = f"the null context, which `{_NULLS[0]}` holds too"
        elif reason := next((why for pattern, why in _IGNORED if re.search(pattern, name)), None):
            result.ignored[name] = reason
        elif not draws and _HEADS_OF_A_DIFFUSION_MODEL.match(name):
            result.ignored[name] = "a head for a diffusion model, which this model was trained without"
        elif (ours := rename(name)) is not None:
            result.weights[ours] = _reshaped(ours, value)
            result.renamed[name] = ours
        else:
            left_over.append(name)
    if left_over:
        raise ValueError(
            f"{len(left_over)} of {len(official)} weights have no place in a DeemForConditionalGeneration, among them "
            f"{', '.join(left_over[:5])}. Expected the state dict of the authors' MMInterleaved with a ConvNeXt."
        )
    if all(name in official for name in _NULLS) and not torch.equal(*(official[name] for name in _NULLS)):
        raise ValueError(
            f"`{_NULLS[1]}` and `{_NULLS[0]}` differ, though they are one parameter under two names. The checkpoint "
            f"is damaged or was put together from two."
        )
    return result


def rename(name: str) -> str | None:
    """Returns our name of an official weight; `None` for what has no place, and for embedding and head."""
    for pattern, ours, parts in _RENAMED:
        if match := re.match(pattern, name):
            renamed = match.expand(ours) + name[match.end() :]
            for old, new in parts:
                renamed = re.sub(old, new, renamed)
            return renamed
    return None


def _reshaped(ours, value):
    """Brings a weight of the synchronisers into our shape; what has an unknown shape stays, and will not fit."""
    if ".scores." in ours and value.shape[:1].numel() % (OFFICIAL_POINTS + 1) == 0:
        # The last of each map's scores is overwritten by a constant before it is used, so it was never trained.
        return value.unflatten(0, (-1, OFFICIAL_POINTS + 1))[:, :-1].flatten(0, 1)
    if ours.endswith(".null_value"):
        return value.flatten()
    if ours.startswith("denoising.unet_synchroniser.") and ours.endswith(".zero.weight") and value.ndim == 4:
        return value[:, :, 0, 0]  # a 1 x 1 convolution
    return value


def _check_computed(name, value, meaning, compute):
    """Raises if a checkpoint has other values for what our code computes than rounding to its dtype explains."""
    given, rounding = value.float(), torch.finfo(value.dtype).eps / 2 if value.is_floating_point() else 0.0
    expected = compute(given)
    if (
        expected is None
        or given.shape != expected.shape
        or not torch.allclose(given, expected, rtol=0.0, atol=max(1e-4, rounding))
    ):
        raise ValueError(
            f"`{name}`, {tuple(value.shape)} in {value.dtype}, is not {meaning}. Was it trained, or changed? This "
            f"project has no place for another."
        )


def _positions(value, class_rows=0):
    side = round(max(value.shape[0] - class_rows, 0) ** 0.5) if value.ndim == 2 else 0
    if not side:
        return None
    positions = sincos_position_embedding(value.shape[1], side, side, grid=side)
    return torch.cat([positions.new_zeros(class_rows, positions.shape[1]), positions])


def _convert_vocabulary(official, vocabulary, result):
    """
    Splits embedding and head into the language model's own rows and those of the new tokens.

    The official head has rows of zeros with a bias of -100 for new tokens and adds a second, trained head to them; the
    image start, the first of them, has a trained vector that is added to its frozen embedding. Ours are the sums.
    """
    if missing := [name for name in _VOCABULARY if name not in official]:
        raise ValueError(f"The checkpoint lacks {', '.join(missing)}; expected the whole model, not a part of it.")
    given = {name: official[name] for name in _VOCABULARY}
    embeddings, start, head, bias, new_head, new_bias = given.values()
    rows, width = embeddings.shape if embeddings.ndim == 2 else (0, 0)
    new = new_bias.numel()
    shapes = [(rows, width), (1, width), (rows, width), (rows,), (new, width), (new,)]
    for (name, value), shape in zip(given.items(), shapes, strict=True):
        if value.shape != shape:
            raise ValueError(
                f"`{name}` is {tuple(value.shape)}; expected {shape} beside `{_VOCABULARY[0]}` of "
                f"{tuple(embeddings.shape)} with {new} new tokens. The checkpoint is damaged, or of other code."
            )
    if rows - new != vocabulary:
        raise ValueError(
            f"The checkpoint has {rows - new} tokens of a language model and {new} new ones, but the language model's "
            f"tokenizer has {vocabulary}. Give the language model that it was trained with, with its own tokenizer."
        )
    if bias[:vocabulary].any():
        raise ValueError("`text_decoder.head.bias` is not zero for the language model's own tokens, which have none.")

    def added(first, second):
        return (first.float() + second.float()).to(first.dtype)

    new_embeddings = embeddings[vocabulary:].clone()
    new_embeddings[:1] = added(new_embeddings[:1], start)
    result.weights |= {
        "language_model.model.embed_tokens.weight": embeddings[:vocabulary],
        "language_model.lm_head.weight": head[:vocabulary],
        "new_embeddings.weight": new_embeddings,
        "new_head.weight": added(head[vocabulary:], new_head),
        "new_head.bias": added(bias[vocabulary:], new_bias),
    }
    result.renamed |= {
        "mm_decoder.embed_tokens.weight": "language_model.model.embed_tokens.weight and new_embeddings.weight",
        "soi_token": "new_embeddings.weight",
        "text_decoder.head.weight": "language_model.lm_head.weight and new_head.weight",
        "text_decoder.head.bias": "new_head.bias",
        "text_decoder.head_new.weight": "new_head.weight",
        "text_decoder.head_new.bias": "new_head.bias",
    }
