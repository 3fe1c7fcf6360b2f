"""Families whose towers take the patches of all pictures in one row."""

import transformers as hf

from .generic import small_config
from .vocabulary import HIDDEN, START, Family, multimodal_types

MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
HALF_MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


def packed(
    name,
    processor,
    patch=14,
    side=None,
    exact=True,
    sizes=None,
    prepare=multimodal_types,
    given=None,
    tokens=None,
    **config,
):
    """A family whose pictures of 4 x 4 and 6 x 4 patches keep their size."""
    side = 4 * patch if side is None else side
    options = {"size": {"shortest_edge": patch * patch, "longest_edge": 10**6}} if given is None else given
    vision = {"patch_size": patch, **config.pop("vision_config", {})}
    return Family(
        lambda: small_config(name, vision_config=vision, **config),
        lambda: processor(patch_size=patch, **options),
        sizes or ((side, side), (side * 3 // 2, side)),
        exact=exact,
        prepare=prepare,
        tokens=tokens,
    )


def _tokens_of_patches(pixels):
    return (pixels["image_grid_thw"].prod(-1) // pixels["image_merge_sizes"] ** 2).tolist()


PACKED = {
    "dots3_note": packed(
        "dots3_note",
        hf.Qwen2VLImageProcessor,
        given={"size": {"shortest_edge": 14 * 14, "longest_edge": 10**6}, "temporal_patch_size": 1},
        vision_config={"adapter_in_dim": 32, "adapter_out_dim": HIDDEN},
        audio_config={"adapter_input_size": 32},
    ),
    "glm46v": packed("glm46v", hf.Glm46VImageProcessor, text_config={"rope_parameters": HALF_MROPE}),
    "glmga": packed("glmga", hf.GlmgaImageProcessor, text_config={"rope_parameters": HALF_MROPE}),
    "glm4v_moe": packed("glm4v_moe", hf.Glm4vImageProcessor, text_config={"rope_parameters": HALF_MROPE}),
    "glm_ocr": packed("glm_ocr", hf.Glm46VImageProcessor, text_config={"rope_parameters": HALF_MROPE}),
    "glm5_next": packed(
        "glm5_next",
        hf.Glm5NextImageProcessor,
        given={"min_image_tokens": 1},
        keeps=("index_topk",),
        text_config={"qk_rope_head_dim": 0},
    ),
    "cosmos3_edge": packed("cosmos3_edge", hf.Cosmos3EdgeImageProcessor, 16, text_config={"rope_parameters": MROPE}),
    "cosmos3_omni": packed(
        "cosmos3_omni",
        hf.Qwen2VLImageProcessor,
        16,
        text_config={"rope_parameters": MROPE, "num_hidden_layers": 3},
        vision_config={"deepstack_visual_indexes": [0, 1]},
    ),
    "ernie4_5_vl_moe": packed(
        "ernie4_5_vl_moe",
        hf.Ernie4_5_VLMoeImageProcessor,
        text_config={"moe_intermediate_size": [32, 32], "rope_parameters": {**MROPE, "mrope_section": [3, 3, 2]}},
    ),
    "exaone4_5": packed("exaone4_5", hf.Qwen2VLImageProcessor),
    "hunyuan_vl": packed(
        "hunyuan_vl",
        hf.HunYuanVLImageProcessor,
        16,
        text_config={
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2, 2]}
        },
    ),
    "hy_v4_vl": packed(
        "hy_v4_vl", hf.HYV4VLImageProcessor, 16, text_config={"rope_parameters": {**MROPE, "mrope_section": [2, 1, 1]}}
    ),
    "hyperclovax_vision_v2": packed("hyperclovax_vision_v2", hf.Qwen2VLImageProcessor),
    "cohere_compass": packed(
        "cohere_compass",
        hf.CohereCompassImageProcessor,
        14,
        text_config={"rope_parameters": {"sliding_attention": MROPE, "full_attention": MROPE}, "num_hidden_layers": 3},
        vision_config={"deepstack_visual_indexes": [0, 1]},
    ),
    "inkling2": packed("inkling2", hf.Inkling2ImageProcessor, 8, 64, given={"size": {"height": 16, "width": 16}}),
    "inkling2_loop": packed(
        "inkling2_loop", hf.Inkling2ImageProcessor, 8, 64, given={"size": {"height": 16, "width": 16}}
    ),
    "kimi_k25": packed(
        "kimi_k25", hf.Kimi_K25ImageProcessor, given={}, vision_config={"pos_emb_height": 8, "pos_emb_width": 8}
    ),
    "lfm3_vl": packed("lfm3_vl", hf.Qwen2VLImageProcessor, 16),
    "minimax_m3_vl": packed("minimax_m3_vl", hf.MiniMaxM3VLImageProcessor),
    "muse_glimmer": packed(
        "muse_glimmer", hf.MuseGlimmerImageProcessor, given={}, out_hidden_size=128, projector_hidden_size=HIDDEN
    ),
    "muse_spark": packed(
        "muse_spark",
        hf.MuseGlimmerImageProcessor,
        given={},
        out_hidden_size=128,
        projector_hidden_size=HIDDEN,
        audio_config={"num_hidden_layers": 4, "hidden_sizes": [8] * 4, "depths": [1] * 4},
    ),
    "paddleocr_vl": packed("paddleocr_vl", hf.PaddleOCRVLImageProcessor, text_config={"rope_parameters": MROPE}),
    "qwen2_5_omni_thinker": packed(
        "qwen2_5_omni_thinker",
        hf.Qwen2VLImageProcessor,
        text_config={"rope_parameters": MROPE},
        vision_start_token_id=START,
    ),
    "qwen3_5_moe": packed("qwen3_5_moe", hf.Qwen2VLImageProcessor, 16),
    "qwen3_omni_moe_thinker": packed(
        "qwen3_omni_moe_thinker",
        hf.Qwen2VLImageProcessor,
        16,
        text_config={"rope_parameters": MROPE, "num_hidden_layers": 3},
        vision_config={"deepstack_visual_indexes": [0, 1]},
        vision_start_token_id=START,
    ),
    "qwen4_exp": packed(
        "qwen4_exp",
        hf.Qwen2VLImageProcessor,
        16,
        text_config={
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 64,
            "indexer_compress_ratio": 4,
            "hc_lowrank": 8,
        },
    ),
    "video_llama_3": packed(
        "video_llama_3", hf.VideoLlama3ImageProcessor, 16, prepare=None, tokens=_tokens_of_patches
    ),
}
