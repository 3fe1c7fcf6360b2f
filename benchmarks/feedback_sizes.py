"""Sizes that `benchmarks.feedback_step` knows by name."""

_UNET = {
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "use_linear_projection": True,
}
_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


def _tower(image_size, depths, dims, width, queries, hidden, layers, heads) -> dict:
    return {
        "open_clip_config": {
            "timm_model_name": "convnext_base",
            "image_size": image_size,
            "timm_kwargs": {"depths": depths, "dims": dims},
        },
        "embed_dim": width,
        "num_queries": queries,
        "resampler_hidden_size": hidden,
        "resampler_num_layers": layers,
        "resampler_num_heads": heads,
    }


# Sizes by name: `mid` is between a toy and the paper's own, which is `paper` (a GPU's work).
CONFIGS = {
    "tiny": {
        "batch": 2,
        "tower": _tower(64, [1, 1, 2, 1], [8, 16, 32, 64], 32, 8, 32, 2, 4),
        "unet": _UNET
        | {
            "sample_size": 8,
            "block_out_channels": (16, 32, 32, 32),
            "attention_head_dim": (2, 4, 4, 4),
            "norm_num_groups": 8,
            "cross_attention_dim": 32,
        },
        "vae": _VAE | {"sample_size": 64, "block_out_channels": (8, 16, 16, 16), "norm_num_groups": 4},
    },
    "mid": {
        "batch": 4,
        "tower": _tower(128, [2, 2, 6, 2], [48, 96, 192, 384], 256, 32, 384, 6, 6),
        "unet": _UNET
        | {
            "sample_size": 32,
            "block_out_channels": (64, 128, 256, 256),
            "attention_head_dim": (1, 2, 4, 4),
            "cross_attention_dim": 256,
        },
        "vae": _VAE | {"sample_size": 256, "block_out_channels": (32, 64, 128, 128)},
    },
    "paper": {
        "batch": 4,
        "tower": _tower(256, [3, 3, 27, 3], [128, 256, 512, 1024], 1024, 77, 768, 12, 12),
        "unet": _UNET
        | {
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "attention_head_dim": (5, 10, 20, 20),
            "cross_attention_dim": 1024,
        },
        "vae": _VAE | {"sample_size": 512, "block_out_channels": (128, 256, 512, 512)},
    },
}
