"""Families whose towers take a picture or a tile a row, and the few with a layout of their own."""

import torch
import transformers as hf

from .generic import TEXT, TOP, shrunk, small_config
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
    open_projector,
    opt,
    qformer,
    text,
    text_alone,
    tiles,
    token_types,
    unresized,
)

SMALL = {"image_size": 32}
SAM = {
    "image_size": 128,
    "patch_size": 16,
    "window_size": 4,
    "global_attn_indexes": [1],
    "mlp_dim": 64,
    "output_channels": 32,
}


def grid(
    name,
    processor=unresized,
    sizes=((32, 32), (32, 32)),
    exact=True,
    tokens=None,
    prepare=None,
    nested=False,
    vision_config=None,
    **config,
):
    """A family of small squares."""
    return Family(
        lambda: small_config(name, vision_config={**SMALL, **(vision_config or {})}, **config),
        processor,
        sizes,
        exact,
        tokens,
        prepare,
        nested,
    )


def _qformer_text(model, batch):
    batch["qformer_input_ids"] = torch.full((2, 6), 7)
    batch["qformer_attention_mask"] = torch.ones(2, 6, dtype=torch.long)


def timm(architecture, **options):
    return {**hf.TimmWrapperConfig(architecture=architecture, **options).to_dict()}


def _attend_to_the_image(model, batch):
    text_alone(model, batch)
    batch["pixel_values"] = batch["pixel_values"][:, None]
    batch["image_attention_mask"] = torch.ones(*batch["input_ids"].shape, 1, dtype=torch.long)


def _pictures_alone(model, batch):
    """The decoder starts from the labels."""
    del batch["input_ids"], batch["attention_mask"]


def _encoder_decoder():
    encoder = hf.ViTConfig(**VISION)
    decoder = hf.GPT2Config(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=2, n_head=4, **SPECIAL)
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return config


def _t5gemma2():
    sizes = {
        "vision_config": {**SMALL, "vision_use_head": False},
        "mm_tokens_per_image": 4,
        "boi_token_index": START,
        "eoi_token_index": END,
    }
    encoder = shrunk(hf.T5Gemma2EncoderConfig, TOP, **sizes)
    return hf.T5Gemma2Config(
        encoder=encoder,
        decoder=shrunk(hf.T5Gemma2DecoderConfig, TEXT),
        image_token_index=IMAGE,
        eoi_token_index=END,
        vocab_size=VOCABULARY,
    )


TWO_CALLS = {"sam_config": {**SAM, "downsample_channels": [32, 32]}}

GRIDS = {
    "gemma3n": Family(
        lambda: hf.Gemma3nConfig(
            text_config=text(
                hf.Gemma3nTextConfig,
                vocab_size_per_layer_input=VOCABULARY - 20,
                hidden_size_per_layer_input=8,
                laurel_rank=4,
                num_kv_shared_layers=0,
                layer_types=["sliding_attention", "full_attention"],
                activation_sparsity_pattern=[0.0, 0.0],
                intermediate_size=[64, 64],
            ).to_dict(),
            vision_config={
                "architecture": "mobilenetv5_300m_enc",
                "hidden_size": 2048,
                "vocab_size": 8,
                "vocab_offset": VOCABULARY - 16,
                "model_args": {"channel_multiplier": 0.05},
            },
            audio_config={
                "hidden_size": 16,
                "conf_num_attention_heads": 2,
                "conf_num_hidden_layers": 1,
                "vocab_size": 4,
                "vocab_offset": VOCABULARY - 8,
                "sscp_conv_channel_size": [4, 4],
                "conf_attention_chunk_size": 4,
            },
            image_token_id=IMAGE,
            audio_token_id=505,
            vision_soft_tokens_per_image=256,
        ),
        lambda: hf.SiglipImageProcessor(do_resize=False, do_normalize=False),
        ((256, 256), (256, 256)),
    ),
    "vision-encoder-decoder": Family(
        _encoder_decoder, lambda: hf.ViTImageProcessor(do_resize=False), tokens=1, prepare=_pictures_alone
    ),
    "t5gemma2": Family(
        _t5gemma2, lambda: hf.Gemma3ImageProcessor(size={"height": 32, "width": 32}), prepare=open_projector
    ),
    "pp_formulanet": Family(
        lambda: small_config(
            "pp_formulanet",
            vision_config={
                **SAM,
                "post_conv_in_channels": 32,
                "post_conv_mid_channels": 32,
                "post_conv_out_channels": HIDDEN,
                "decoder_hidden_size": HIDDEN,
                "initializer_range": 0.02,
            },
            text_config={
                "d_model": HIDDEN,
                "encoder_layers": 1,
                "decoder_layers": 2,
                "decoder_ffn_dim": 64,
                "decoder_attention_heads": 4,
            },
        ),
        lambda: hf.PPFormulaNetImageProcessor(size={"height": 128, "width": 128}),
        ((128, 128), (128, 128)),
        exact=False,
        tokens=1,
        prepare=text_alone,
    ),
    "step3p7": grid("step3p7", lambda: hf.Step3p7ImageProcessor(size={"height": 32, "width": 32})),
    "unlimited_ocr": Family(
        lambda: small_config("unlimited_ocr", vision_config=TWO_CALLS),
        lambda: hf.UnlimitedOcrImageProcessor(size={"height": 128, "width": 128}, tile_size=128),
        ((256, 128), (128, 128)),
        exact=False,
    ),
    "deepseek_ocr2": Family(
        lambda: small_config(
            "deepseek_ocr2", vision_config=TWO_CALLS, text_config={"mlp_layer_types": ["dense", "sparse"]}
        ),
        lambda: hf.DeepseekOcr2ImageProcessor(size={"height": 128, "width": 128}, tile_size=128),
        ((256, 128), (128, 128)),
        exact=False,
    ),
    "kosmos-2.5": Family(
        lambda: small_config(
            "kosmos-2.5",
            vision_config={"patch_embed_hidden_size": 192},
            text_config={"embed_dim": HIDDEN, "layers": 2, "ffn_dim": 64, "attention_heads": 2},
            latent_query_num=4,
        ),
        lambda: hf.Kosmos2_5ImageProcessor(patch_size={"height": 8, "width": 8}, max_patches=16),
        tokens=4,
    ),
    "pix2struct": Family(
        lambda: small_config(
            "pix2struct",
            vision_config={"patch_embed_hidden_size": 192, "d_ff": 64, "d_kv": 16, "seq_len": 32},
            text_config={"d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2},
        ),
        lambda: hf.Pix2StructImageProcessor(patch_size={"height": 8, "width": 8}, max_patches=16),
        tokens=1,
    ),
    "molmo2": Family(
        lambda: small_config(
            "molmo2",
            vision_config={"image_size": [32, 32], "num_position_embeddings": 16},
            adapter_config={"vision_feature_layer": [-1, -2]},
            image_patch_id=IMAGE,
        ),
        lambda: hf.Molmo2ImageProcessor(
            size={"height": 32, "width": 32}, patch_size=8, max_crops=2, overlap_margins=[1, 1]
        ),
        exact=False,
        prepare=multimodal_types,
    ),
    "nemotron_h_omni": Family(
        lambda: small_config(
            "nemotron_h_omni",
            vision_config={"video_temporal_patch_size": 2},
            text_config={
                "layers_block_type": ["mamba", "full_attention"],
                "mamba_num_heads": 4,
                "mamba_head_dim": 16,
                "ssm_state_size": 8,
                "n_groups": 2,
                "moe_shared_expert_intermediate_size": 32,
            },
            vision_hidden_size=32,
        ),
        lambda: hf.NemotronH_Omni_Reasoning_V3ImageProcessor(patch_size=8, min_num_patches=16, max_num_patches=64),
    ),
    "inkling_mm_model": Family(lambda: small_config("inkling_mm_model"), hf.InklingImageProcessor, tokens=1),
    "llama4": Family(
        lambda: small_config(
            "llama4",
            vision_config={
                "image_size": 32,
                "intermediate_size": 128,
                "vision_output_dim": 48,
                "projector_input_dim": 48,
                "projector_output_dim": 48,
            },
            text_config={"intermediate_size_mlp": 64, "num_experts_per_tok": 1},
        ),
        lambda: hf.Llama4ImageProcessor(size={"height": 32, "width": 32}, max_patches=4),
        ((64, 32), (32, 32)),
        exact=False,
        tokens=lambda pixels: [12, 4],
    ),
    "shieldgemma2": grid(
        "shieldgemma2",
        lambda: hf.Gemma3ImageProcessor(size={"height": 32, "width": 32}),
        mm_tokens_per_image=4,
        prepare=token_types,
    ),
    "granite4_vision": grid(
        "granite4_vision",
        lambda: hf.LlavaNextImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=PINPOINTS
        ),
        TILED,
        exact=False,
        image_grid_pinpoints=PINPOINTS,
        downsample_rate="2/4",
        deepstack_layer_map=[[1, 0], [2, 1]],
        spatial_target_layers=[2, 3, 4, 5],
        vision_config={"hidden_size": 64},
        text_config={"num_hidden_layers": 6},
        tokens=lambda pixels: [14 + 10 * (height == width) for height, width in pixels["image_sizes"].tolist()],
        projector_dropout=0.0,
    ),
    "idefics": grid(
        "idefics",
        lambda: hf.IdeficsImageProcessor(image_size=32),
        tokens=1,
        vision_config={"embed_dim": 32},
        freeze_text_layers=False,
        freeze_vision_layers=False,
        alpha_initializer="normal",
        alpha_type="vector",
        alphas_initializer_range=0.3,
        prepare=_attend_to_the_image,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
    ),
    "minicpmv4_7": grid(
        "minicpmv4_7",
        lambda: hf.MiniCPMV4_6ImageProcessor(patch_size=8, scale_resolution=64, slice_mode=False),
        ((64, 64), (96, 64)),
        exact=False,
        prepare=multimodal_types,
    ),
    "aria": grid(
        "aria",
        lambda: hf.AriaImageProcessor(max_image_size=490),
        ((490, 490), (490, 420)),
        tokens=4,
        vision_config={"image_size": 490, "patch_size": 14},
        text_config={"moe_num_experts": 2, "moe_topk": 2},
        projector_patch_to_query_dict={1225: 4},
    ),
    "blip": grid("blip", lambda: hf.BlipImageProcessor(do_resize=False), tokens=1, prepare=text_alone),
    "instructblip": grid(
        "instructblip",
        lambda: hf.BlipImageProcessor(do_resize=False),
        tokens=4,
        prepare=_qformer_text,
        qformer_config=qformer(),
        text_config=opt(),
        num_query_tokens=4,
        image_token_index=IMAGE,
    ),
    "janus": grid(
        "janus",
        lambda: hf.JanusImageProcessor(size={"height": 32, "width": 32}, min_size=8),
        vision_config={"num_image_tokens": 16},
        vq_config={
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "num_patches": 16,
            "projection_dim": HIDDEN,
            "image_token_embed_dim": HIDDEN,
            "embed_dim": 8,
            "num_embeddings": 16,
        },
    ),
    "llava_next_video": grid(
        "llava_next_video",
        lambda: hf.LlavaNextImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=PINPOINTS
        ),
        TILED,
        exact=False,
        image_grid_pinpoints=PINPOINTS,
    ),
    "video_llava": grid(
        "video_llava",
        unresized,
        tokens=16,
        prepare=lambda model, batch: batch.update(pixel_values_images=batch.pop("pixel_values")),
    ),
    "qianfan_ocr": grid(
        "qianfan_ocr",
        tiles(),
        TILED,
        exact=False,
        vision_config={"image_size": [32, 32], "patch_size": [8, 8]},
        image_seq_length=4,
    ),
    "granite_docling": grid(
        "granite_docling",
        lambda: hf.GraniteDoclingImageProcessor(size={"height": 32, "width": 32}, max_patches=4),
        TILED,
        exact=False,
        vision_config={"scale_factor": 2, "deepstack_visual_indexes": [0, 1]},
        text_config={"num_hidden_layers": 3},
        nested=True,
    ),
    "perception_lm": Family(
        lambda: hf.PerceptionLMConfig(
            vision_config=timm(
                "vit_pe_core_large_patch14_336",
                model_args={
                    "embed_dim": 32,
                    "img_size": [28, 28],
                    "depth": 2,
                    "num_heads": 2,
                    "global_pool": "",
                    "use_post_transformer_norm": False,
                    "init_values": 0.1,
                    "ref_feat_shape": [1, 1],
                },
                do_pooling=False,
            ),
            text_config=text(hf.LlamaConfig),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_use_cls_token=True,
            projector_pooling_ratio=1,
        ),
        lambda: hf.PerceptionLMImageProcessor(tile_size=28, max_num_tiles=4, vision_input_type="vanilla"),
        ((28, 28), (28, 28)),
        tokens=4,
    ),
    "fast_vlm": Family(
        lambda: hf.FastVlmConfig(
            vision_config=timm(
                "fastvit_mci3",
                do_pooling=True,
                global_pool="avg",
                hidden_size=64,
                model_args={"inference_mode": True, "layers": [1] * 5, "embed_dims": [32] * 5},
            ),
            text_config=text(hf.Qwen2Config),
            image_token_index=IMAGE,
        ),
        unresized,
        ((128, 128), (128, 128)),
    ),
    "pp_chart2table": grid(
        "pp_chart2table",
        lambda: hf.PPChart2TableImageProcessor(size={"height": 128, "width": 128}),
        ((128, 128), (128, 128)),
        vision_config=SAM,
    ),
    "mistral_large4": grid(
        "mistral_large4",
        lambda: hf.PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8}),
        ((64, 32), (32, 32)),
        vision_config={"image_size": 64},
    ),
    "minicpmv4_6": grid(
        "minicpmv4_6",
        lambda: hf.MiniCPMV4_6ImageProcessor(patch_size=8, scale_resolution=64, slice_mode=False),
        ((64, 64), (96, 64)),
        exact=False,
    ),
    "minicpm_ocr": grid(
        "minicpm_ocr",
        lambda: hf.MiniCPMOcrImageProcessor(patch_size=8, scale_resolution=64, slice_mode=False),
        ((64, 64), (96, 64)),
        exact=False,
    ),
}
