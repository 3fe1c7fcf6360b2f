"""Families that people fine-tune, each with a configuration written out."""

import transformers as hf

from .vocabulary import (
    END,
    HIDDEN,
    IMAGE,
    PINPOINTS,
    SPECIAL,
    START,
    TILED,
    VIDEO,
    VISION,
    VOCABULARY,
    Family,
    multimodal_types,
    open_gates,
    opt,
    qformer,
    siglip,
    text,
    text_alone,
    tiles,
    token_types,
    tokens_of_tiles,
    unresized,
)


def _qwen(config_class, text_class, vision, text_options=None):
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    # Three layers: DeepStack's second level enters behind the second, and must still reach the text.
    options = {"rope_parameters": rope, "num_hidden_layers": 3} if text_options is None else text_options
    return lambda: config_class(
        text_config=text(text_class, **options).to_dict(),
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def _qwen_processor(patch):
    side = 2 * patch
    return lambda: hf.Qwen2VLImageProcessor(patch_size=patch, min_pixels=side**2, max_pixels=side**2 * 100)


QWEN3_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "out_hidden_size": HIDDEN,
    "num_heads": 2,
    "patch_size": 16,
    "intermediate_size": 64,
    "num_position_embeddings": 64,
}
DEEPSTACK = {**QWEN3_VISION, "deepstack_visual_indexes": [0, 1]}


def _idefics3(config_class):
    return lambda: config_class(
        vision_config=dict(VISION), text_config=text(hf.LlamaConfig), image_token_id=IMAGE, scale_factor=2
    )


def image_positions(model, batch):
    """Kosmos-2 is told the places of its image tokens."""
    batch["image_embeds_position_mask"] = (batch["input_ids"] == IMAGE).long()


POPULAR = {
    "llava": Family(
        lambda: hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**VISION), text_config=text(hf.LlamaConfig), image_token_index=IMAGE
        ),
        unresized,
    ),
    "vipllava": Family(
        lambda: hf.VipLlavaConfig(
            vision_config=hf.CLIPVisionConfig(**VISION),
            text_config=text(hf.LlamaConfig),
            image_token_index=IMAGE,
            vision_feature_layers=[-3, -2],
        ),
        unresized,
    ),
    "llava_next": Family(
        lambda: hf.LlavaNextConfig(
            vision_config=hf.CLIPVisionConfig(**VISION),
            text_config=text(hf.LlamaConfig),
            image_token_index=IMAGE,
            image_grid_pinpoints=PINPOINTS,
        ),
        lambda: hf.LlavaNextImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=PINPOINTS
        ),
        TILED,
        exact=False,
    ),
    "llava_onevision": Family(
        lambda: hf.LlavaOnevisionConfig(
            vision_config=siglip(),
            text_config=text(hf.Qwen2Config),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=PINPOINTS,
        ),
        lambda: hf.LlavaOnevisionImageProcessor(size={"height": 32, "width": 32}, image_grid_pinpoints=PINPOINTS),
        TILED,
        exact=False,
    ),
    "qwen2_vl": Family(
        _qwen(
            hf.Qwen2VLConfig,
            hf.Qwen2VLTextConfig,
            {"depth": 3, "embed_dim": 32, "hidden_size": HIDDEN, "num_heads": 2, "patch_size": 14, "mlp_ratio": 2},
        ),
        _qwen_processor(14),
        ((56, 56), (84, 56)),
        prepare=multimodal_types,
    ),
    "qwen2_5_vl": Family(
        _qwen(
            hf.Qwen2_5_VLConfig,
            hf.Qwen2_5_VLTextConfig,
            {
                "depth": 3,
                "hidden_size": 32,
                "out_hidden_size": HIDDEN,
                "num_heads": 2,
                "patch_size": 14,
                "intermediate_size": 64,
                "fullatt_block_indexes": [1],
            },
        ),
        _qwen_processor(14),
        ((56, 56), (84, 56)),
        prepare=multimodal_types,
    ),
    "qwen3_vl": Family(
        _qwen(hf.Qwen3VLConfig, hf.Qwen3VLTextConfig, DEEPSTACK),
        _qwen_processor(16),
        ((64, 64), (96, 64)),
        prepare=multimodal_types,
    ),
    "qwen3_vl_moe": Family(
        _qwen(hf.Qwen3VLMoeConfig, hf.Qwen3VLMoeTextConfig, DEEPSTACK),
        _qwen_processor(16),
        ((64, 64), (96, 64)),
        prepare=multimodal_types,
    ),
    "qwen3_5": Family(
        _qwen(
            hf.Qwen3_5Config,
            hf.Qwen3_5TextConfig,
            QWEN3_VISION,
            {
                "linear_key_head_dim": 16,
                "linear_value_head_dim": 16,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "layer_types": ["linear_attention", "full_attention"],
                "head_dim": 32,
                "rope_parameters": {
                    "rope_type": "default",
                    "mrope_section": [2, 1, 1],
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.25,
                    "mrope_interleaved": True,
                },
            },
        ),
        _qwen_processor(16),
        ((64, 64), (96, 64)),
        prepare=multimodal_types,
    ),
    "glm4v": Family(
        lambda: hf.Glm4vConfig(
            text_config=text(
                hf.Glm4vTextConfig,
                rope_parameters={
                    "rope_type": "default",
                    "mrope_section": [2, 1, 1],
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.5,
                },
            ).to_dict(),
            vision_config={
                "depth": 3,
                "hidden_size": 32,
                "out_hidden_size": HIDDEN,
                "num_heads": 2,
                "patch_size": 14,
                "intermediate_size": 64,
                "image_size": 112,
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            image_start_token_id=START,
            image_end_token_id=END,
        ),
        lambda: hf.Glm4vImageProcessor(size={"shortest_edge": 112 * 112, "longest_edge": 112 * 112 * 16}),
        ((112, 112), (168, 112)),
        exact=False,
        prepare=multimodal_types,
    ),
    "internvl": Family(
        lambda: hf.InternVLConfig(
            vision_config={**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
            text_config=text(hf.Qwen2Config),
            image_token_id=IMAGE,
            image_seq_length=4,
        ),
        tiles(),
        TILED,
        exact=False,
    ),
    "gemma3": Family(
        lambda: hf.Gemma3Config(
            vision_config=siglip(),
            text_config=text(hf.Gemma3TextConfig),
            mm_tokens_per_image=4,
            image_token_index=IMAGE,
            boi_token_index=START,
            eoi_token_index=END,
        ),
        lambda: hf.Gemma3ImageProcessor(size={"height": 32, "width": 32}),
        prepare=token_types,
    ),
    "paligemma": Family(
        lambda: hf.PaliGemmaConfig(
            vision_config=siglip(projection_dim=HIDDEN),
            text_config=text(hf.GemmaConfig),
            image_token_index=IMAGE,
            projection_dim=HIDDEN,
            hidden_size=HIDDEN,
            vocab_size=VOCABULARY,
        ),
        lambda: hf.SiglipImageProcessor(do_resize=False),
        prepare=token_types,
    ),
    "smolvlm": Family(
        _idefics3(hf.SmolVLMConfig),
        lambda: hf.SmolVLMImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        TILED,
        exact=False,
        nested=True,
        tokens=tokens_of_tiles,
    ),
    "idefics3": Family(
        _idefics3(hf.Idefics3Config),
        lambda: hf.Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        TILED,
        exact=False,
        nested=True,
        tokens=tokens_of_tiles,
    ),
    "idefics2": Family(
        lambda: hf.Idefics2Config(
            vision_config=dict(VISION),
            text_config=text(hf.MistralConfig),
            perceiver_config={
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 16,
                "num_key_value_heads": 1,
                "hidden_size": HIDDEN,
            },
            image_token_id=IMAGE,
        ),
        lambda: hf.Idefics2ImageProcessor(size={"shortest_edge": 32, "longest_edge": 32}),
        tokens=4,
        nested=True,
    ),
    "mllama": Family(
        lambda: hf.MllamaConfig(
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 3,
                "num_global_layers": 1,
                "attention_heads": 2,
                "vision_output_dim": 96,
                "image_size": 32,
                "patch_size": 8,
                "max_num_tiles": 4,
                "intermediate_layers_indices": [0, 1],
                "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
            },
            text_config=text(
                hf.models.mllama.configuration_mllama.MllamaTextConfig,
                cross_attention_layers=[1],
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            ).to_dict(),
            image_token_index=VOCABULARY + 7,
        ),
        lambda: hf.MllamaImageProcessor(size={"height": 32, "width": 32}, max_image_tiles=4),
        ((64, 32), (32, 32)),
        exact=False,
        tokens=1,
        prepare=open_gates,
        nested=True,
    ),
    "mistral3": Family(
        lambda: hf.Mistral3Config(
            vision_config=hf.PixtralVisionConfig(
                **{**VISION, "image_size": 64, "head_dim": 16},
            ),
            text_config=text(hf.MistralConfig),
            image_token_index=IMAGE,
            spatial_merge_size=2,
        ),
        lambda: hf.PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8}),
        ((64, 32), (32, 32)),
    ),
    "lfm2_vl": Family(
        lambda: hf.Lfm2VlConfig(
            vision_config=hf.Siglip2VisionConfig(
                **{k: v for k, v in VISION.items() if k != "image_size"}, num_patches=16, vision_use_head=False
            ),
            text_config=text(hf.Lfm2Config, block_ff_dim=64, layer_types=["conv", "full_attention"]),
            image_token_id=IMAGE,
            projector_hidden_size=64,
        ),
        lambda: hf.Lfm2VlImageProcessor(
            encoder_patch_size=8, tile_size=32, min_image_tokens=4, max_image_tokens=16, do_image_splitting=False
        ),
        ((64, 32), (48, 48)),
    ),
    "gemma4": Family(
        lambda: hf.Gemma4Config(
            text_config=text(
                hf.Gemma4TextConfig,
                num_experts=None,
                moe_intermediate_size=None,
                vocab_size_per_layer_input=VOCABULARY,
                hidden_size_per_layer_input=8,
                layer_types=["sliding_attention", "full_attention"],
                num_kv_shared_layers=0,
                global_head_dim=16,
            ).to_dict(),
            vision_config={
                **{k: v for k, v in VISION.items() if k != "image_size"},
                "num_key_value_heads": 2,
                "head_dim": 16,
                "position_embedding_size": 64,
                "pooling_kernel_size": 2,
            },
            audio_config=None,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=499,
            boi_token_id=START,
            eoi_token_id=END,
        ),
        lambda: hf.Gemma4ImageProcessor(patch_size=8, max_soft_tokens=70, pooling_kernel_size=2),
        ((64, 64), (96, 64)),
        exact=False,
        prepare=multimodal_types,
    ),
    "aya_vision": Family(
        lambda: hf.AyaVisionConfig(
            vision_config=siglip(), text_config=text(hf.Cohere2Config), image_token_index=IMAGE
        ),
        tiles(),
        TILED,
        exact=False,
    ),
    "cohere2_vision": Family(
        lambda: hf.Cohere2VisionConfig(
            vision_config=siglip(),
            text_config=text(hf.Cohere2Config),
            image_token_id=IMAGE,
            alignment_intermediate_size=64,
        ),
        tiles(),
        TILED,
        exact=False,
    ),
    "deepseek_vl": Family(
        lambda: hf.DeepseekVLConfig(vision_config=siglip(), text_config=text(hf.LlamaConfig), image_token_id=IMAGE),
        lambda: hf.DeepseekVLImageProcessor(size={"height": 32, "width": 32}, min_size=8),
    ),
    "deepseek_vl_hybrid": Family(
        lambda: hf.DeepseekVLHybridConfig(
            vision_config=dict(VISION),
            high_res_vision_config=hf.SamVisionConfig(
                hidden_size=32,
                output_channels=32,
                num_hidden_layers=3,
                num_attention_heads=2,
                image_size=128,
                patch_size=16,
                mlp_dim=64,
                window_size=4,
                global_attn_indexes=[1],
            ),
            text_config=text(hf.LlamaConfig),
            image_token_id=IMAGE,
        ),
        lambda: hf.DeepseekVLHybridImageProcessor(
            size={"height": 32, "width": 32}, high_res_size={"height": 128, "width": 128}, min_size=8
        ),
        tokens=16,
    ),
    "ovis2": Family(
        lambda: hf.Ovis2Config(
            vision_config={
                **VISION,
                "image_size": 28,
                "patch_size": 7,
                "vocab_size": 40,
                "hidden_stride": 2,
                "num_visual_indicator_tokens": 5,
            },
            text_config=text(hf.Qwen2Config),
            image_token_id=IMAGE,
            visual_indicator_token_ids=[490, 491, 492, 493, 494],
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
        ),
        lambda: hf.Ovis2ImageProcessor(size={"height": 28, "width": 28}, crop_to_patches=False),
        ((28, 28), (28, 28)),
        tokens=4,
    ),
    "florence2": Family(
        lambda: hf.Florence2Config(
            vision_config={
                "depths": [1] * 4,
                "embed_dim": [16, 16, 32, 32],
                "num_heads": [2] * 4,
                "num_groups": [2] * 4,
                "window_size": 4,
                "projection_dim": HIDDEN,
                "drop_path_rate": 0.0,
                "max_position_embeddings": 50,
            },
            text_config=hf.BartConfig(
                vocab_size=VOCABULARY,
                d_model=HIDDEN,
                encoder_layers=2,
                decoder_layers=2,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                decoder_start_token_id=3,
                forced_eos_token_id=3,
                **SPECIAL,
            ),
            image_token_id=IMAGE,
        ),
        unresized,
        ((64, 64), (64, 64)),
    ),
    "got_ocr2": Family(
        lambda: hf.GotOcr2Config(
            vision_config={
                "hidden_size": 32,
                "output_channels": 32,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "image_size": 128,
                "patch_size": 16,
                "mlp_dim": 64,
                "window_size": 4,
                "global_attn_indexes": [1],
            },
            text_config=text(hf.Qwen2Config),
            image_token_index=IMAGE,
        ),
        lambda: hf.GotOcr2ImageProcessor(size={"height": 128, "width": 128}),
        ((128, 128), (128, 128)),
    ),
    "blip-2": Family(
        lambda: hf.Blip2Config(
            vision_config=dict(VISION),
            qformer_config=qformer(),
            text_config=opt(),
            num_query_tokens=4,
            image_token_index=IMAGE,
        ),
        lambda: hf.BlipImageProcessor(do_resize=False),
        tokens=4,
    ),
    "kosmos-2": Family(
        lambda: hf.Kosmos2Config(
            text_config={
                "vocab_size": VOCABULARY,
                "embed_dim": HIDDEN,
                "layers": 2,
                "ffn_dim": 64,
                "attention_heads": 2,
                "max_position_embeddings": 256,
                **SPECIAL,
            },
            vision_config=dict(VISION),
            latent_query_num=4,
        ),
        unresized,
        tokens=4,
        prepare=image_positions,
    ),
    "git": Family(
        lambda: hf.GitConfig(
            vision_config={**VISION, "hidden_size": HIDDEN},
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            **SPECIAL,
        ),
        unresized,
        tokens=1,
        prepare=text_alone,
    ),
    "lighton_ocr": Family(
        lambda: hf.LightOnOcrConfig(
            vision_config=hf.PixtralVisionConfig(**{**VISION, "image_size": 64, "head_dim": 16}),
            text_config=text(hf.Qwen3Config),
            image_token_id=IMAGE,
            spatial_merge_size=2,
        ),
        lambda: hf.PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8}),
        ((64, 32), (32, 32)),
    ),
}
