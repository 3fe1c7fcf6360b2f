"""Tiny diffusion models of every known class in diffusers' layout, with random weights in place of zeros."""

import json

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)

from ..tiny import tiny_unet, tiny_vae

CONTEXT_DIM = 16
SIZE = 8  # latent cells along each side


def sdxl():
    return tiny_unet(
        CONTEXT_DIM,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=4 * 6 + 12,
    )


def pixart(use_additional_conditions, sample_size=SIZE, channels=4):
    """PixArt's transformer; like the published weights it predicts a variance too."""
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=2 * channels,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=sample_size,
        patch_size=2,
        norm_num_groups=4,
        caption_channels=CONTEXT_DIM,
        use_additional_conditions=use_additional_conditions,
    )


def sd3():
    return SD3Transformer2DModel(
        sample_size=SIZE,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=CONTEXT_DIM,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=16,
    )


def flux(guidance_embeds):
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=CONTEXT_DIM,
        pooled_projection_dim=12,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )


def sana():
    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=CONTEXT_DIM,
        sample_size=SIZE,
    )


def lumina2():
    return Lumina2Transformer2DModel(
        sample_size=SIZE,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(16, 16, 16),
        cap_feat_dim=CONTEXT_DIM,
    )


def auraflow():
    model = AuraFlowTransformer2DModel(
        sample_size=SIZE,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=CONTEXT_DIM,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    with torch.no_grad():
        # Its gates are products of a time embedding that is next to nothing at this width.
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def deep_compression():
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.41407,
    )


def flow(**settings):
    return FlowMatchEulerDiscreteScheduler(**settings)


# Name: network, scheduler, autoencoder; as the published folder combines them.
DIFFUSION_MODELS = {
    "sd1": lambda: (tiny_unet(CONTEXT_DIM), DDPMScheduler(), tiny_vae()),
    "sd2": lambda: (tiny_unet(CONTEXT_DIM), DDPMScheduler(prediction_type="v_prediction"), tiny_vae()),
    "sdxl": lambda: (sdxl(), DDPMScheduler(), tiny_vae()),
    "pixart": lambda: (pixart(False), DDPMScheduler(), tiny_vae()),
    "pixart-1024": lambda: (pixart(True), DDPMScheduler(), tiny_vae()),
    "sd3": lambda: (sd3(), flow(shift=3.0), tiny_vae(shift_factor=0.0609, scaling_factor=1.5305)),
    "flux-dev": lambda: (flux(True), flow(shift=3.0, use_dynamic_shifting=True), tiny_vae(shift_factor=0.1159)),
    "flux-schnell": lambda: (flux(False), flow(), tiny_vae(shift_factor=0.1159)),
    "sana": lambda: (
        sana(),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        deep_compression(),
    ),
    "lumina2": lambda: (lumina2(), flow(shift=6.0), tiny_vae(shift_factor=0.1159)),
    "auraflow": lambda: (auraflow(), flow(shift=1.73), tiny_vae()),
}


@torch.no_grad()
def randomise_zeros(model):
    """Gives every weight that is all zeros (outputs, gates) small random values, so that gradients flow."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.2)
    return model


def save_diffusion_model(path, name):
    """Saves the tiny diffusion model `name` at `path` in diffusers' layout and returns the path."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, scheduler, autoencoder = DIFFUSION_MODELS[name]()
        randomise_zeros(network)
    folder = "unet" if isinstance(network, UNet2DConditionModel) else "transformer"
    parts = {folder: network, "scheduler": scheduler, "vae": autoencoder}
    for part, value in parts.items():
        value.save_pretrained(path / part)
    index = {part: ["diffusers", type(value).__name__] for part, value in parts.items()}
    (path / "model_index.json").write_text(json.dumps({"_class_name": name, **index}))
    return path
