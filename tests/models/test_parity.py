"""The whole interleaved model against tensors of the authors' own code (fixtures F4 and F5), from their weights."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import LlamaConfig

from deem_plugin.feedback import Generator, UNetDenoiser, VaeCodec
from deem_plugin.feedback.timesteps import shrink_timesteps
from deem_plugin.models.configuration import DeemConfig
from deem_plugin.models.deem import DeemForConditionalGeneration
from deem_plugin.models.interleaving import fill_image_slots, make_labels
from deem_plugin.models.losses import Draws
from deem_plugin.models.official import convert_state_dict

from ..parity_weights import parity_tower_config

VALUES = {"atol": 1e-5, "rtol": 1e-5}
GRADIENTS = 1e-4  # relative
NEW_TOKENS, START = 100, 100


@pytest.fixture(scope="module")
def weights(shared_dir):
    return load_file(shared_dir / "parity/f45_weights.safetensors")


@pytest.fixture(scope="module")
def f4(shared_dir):
    return load_file(shared_dir / "parity/f4_interleave.safetensors")


@pytest.fixture(scope="module")
def f5(shared_dir):
    return load_file(shared_dir / "parity/f5_as_is.safetensors")


@pytest.fixture(scope="module")
def f5_summary(shared_dir):
    return json.loads((shared_dir / "parity/f5_losses.json").read_text())


def parity_config(**options) -> DeemConfig:
    text = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        rms_norm_eps=1e-6,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=99,
    )
    return DeemConfig(
        text_config=text.to_dict(),
        vision_config={"model_type": "deem_vision", **parity_tower_config()},
        num_new_tokens=6,
        context_dim=64,
        image_decoder_heads=4,
        image_decoder_intermediate_size=96,
        **options,
    )


@pytest.fixture(scope="module")
def generator(shared_dir, weights):
    settings = json.loads((shared_dir / "parity/f2_summary.json").read_text())["config"]
    unet, vae = UNet2DConditionModel(**settings["unet"]), AutoencoderKL(**settings["vae"])
    for model, name in ((unet, "unet"), (vae, "vae")):
        prefix = f"visual_tokenizer.encoder.{name}."
        model.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    return Generator(UNetDenoiser(unet, DDPMScheduler(**settings["scheduler"])), VaeCodec(vae))


def parity_model(weights, generator=None, **options):
    model = DeemForConditionalGeneration(parity_config(**options))
    official = {k: v for k, v in weights.items() if "mmfs_module" not in k and "llama_cross_attn" not in k}
    model.load_state_dict(convert_state_dict(official, START).weights, strict=True)
    if generator is not None:
        model.attach_generator(generator)
    return model


@pytest.fixture(scope="module")
def draws(f5):
    """The official draws in their order; `inverted_noise` shrinks the feedback's timesteps after they are drawn."""
    return {
        "feedback": Draws(
            latent_noise=f5["draw.0.vae_eps"],
            noise=f5["draw.1.randn_like"],
            timesteps=shrink_timesteps(f5["draw.2.randint"], 1000),
        ),
        "image": Draws(
            latent_noise=f5["draw.4.vae_eps"],
            noise=f5["draw.5.randn_like"],
            timesteps=f5["draw.6.randint"],
            dropped=f5["draw.3.rand_like"].flatten() < 0.1,
        ),
    }


def normalised(images, config):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.image_mean, config.image_std))
    return (images - mean) / std


def f5_inputs(f5, model) -> dict:
    """What our model takes of the official inputs; documents begin at `bos`, as their `nearest_bos_idxs` have it."""
    ids = f5["text_ids"]
    labels = make_labels(ids, f5["attention_mask"], bos_token_id=1, image_token_id=101, image_start_token_id=START)
    assert torch.equal(labels[:, 1:], f5["labels"])
    return {
        "input_ids": ids,
        "attention_mask": f5["attention_mask"],
        "pixel_values": normalised(f5["image_tensors"], model.config.vision_config),
        "region_masks": f5["image_tensors_mask"],
        "target_pixel_values": f5["image_tensors_dec"] * 2 - 1,
        "labels": labels,
    }


def test_an_embedded_row_is_the_official_one(weights, f4):
    model, ids = parity_model(weights).eval(), f4["text_ids"]

    embeddings = model.embed(ids)
    features = model.get_image_features(normalised(f4["image_tensors"], model.config.vision_config))
    filled = fill_image_slots(embeddings, ids, model.config.image_token_id, features.pooler_output)

    torch.testing.assert_close(features.pooler_output, f4["vis_embed"], **VALUES)
    torch.testing.assert_close(filled, f4["mm_embeds"], **VALUES)


def test_losses_are_the_official_ones(weights, generator, f5, f5_summary, draws):
    model = parity_model(weights, generator, official_image_loss=True).train()
    expected = f5_summary["cases"]["as_is"]

    output = model(**f5_inputs(f5, model), draws=draws)

    torch.testing.assert_close(model.feedback_head(output.image_tokens), f5["call0.cond"], **VALUES)
    assert output.feedback_loss.item() == pytest.approx(expected["loss_sniffer"], abs=1e-5)
