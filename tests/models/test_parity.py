"""The whole interleaved model against tensors of the authors' own code (fixtures F4 and F5), from their weights."""

import pytest
import torch

from deem_plugin.models.configuration import DeemConfig
from deem_plugin.models.deem import DeemForConditionalGeneration
from deem_plugin.models.interleaving import fill_image_slots
from deem_plugin.models.official import convert_state_dict
from experiments.faithful.deem import PublishedDeem

from ..parity_weights import parity_text_config, parity_tower_config
from .official_labels import make_labels

VALUES = {"atol": 1e-5, "rtol": 1e-5}
GRADIENTS = 1e-4  # relative
NEW_TOKENS, START = 100, 100


def parity_config(**options) -> DeemConfig:
    return DeemConfig(
        text_config=parity_text_config().to_dict(),
        vision_config={"model_type": "deem_vision", **parity_tower_config()},
        num_new_tokens=6,
        context_dim=64,
        image_decoder_heads=4,
        image_decoder_intermediate_size=96,
        language_synchroniser={"frequency": 4},
        unet_synchroniser={
            "unet": {"sample_size": 16, "block_out_channels": [16, 32, 32, 32], "layers_per_block": 2},
            "inner_dim": 32,
            "num_heads": 4,
        },
        **options,
    )


def parity_model(weights, diffusion_model=None, kind=DeemForConditionalGeneration, **options):
    model = kind(parity_config(**options))
    model.load_state_dict(convert_state_dict(weights, START).weights, strict=True)
    if diffusion_model is not None:
        model.attach_diffusion_model(diffusion_model)
    return model


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
        "document_ids": documents(ids),
    }


def test_an_embedded_row_is_the_official_one(weights, f4):
    model, ids = parity_model(weights).eval(), f4["text_ids"]

    embeddings = model.embed(ids)
    features = model.get_image_features(normalised(f4["image_tensors"], model.config.vision_config))
    filled = fill_image_slots(embeddings, ids, model.config.image_token_id, features.pooler_output)

    torch.testing.assert_close(features.pooler_output, f4["vis_embed"], **VALUES)
    torch.testing.assert_close(filled, f4["mm_embeds"], **VALUES)


def documents(ids):
    """Numbers of the packed documents; in these fixtures each begins with `bos`."""
    return (ids == 1).cumsum(1)


def test_hidden_states_and_logits_are_the_official_ones(weights, f4):
    model = parity_model(weights, kind=PublishedDeem).eval()
    pixel_values = normalised(f4["image_tensors"], model.config.vision_config)

    output = model(
        f4["text_ids"], f4["attention_mask"], pixel_values=pixel_values, document_ids=documents(f4["text_ids"])
    )

    assert torch.equal(output.image_maps[1].float(), f4["cross_attention_mask"])
    torch.testing.assert_close(output.last_hidden_state, f4["mm_hidden_state"], **VALUES)
    torch.testing.assert_close(output.logits, f4["text_logits"], **VALUES)


def test_without_the_defects_only_the_second_document_of_a_row_reads_otherwise(weights, f4):
    model = parity_model(weights).eval()
    pixel_values = normalised(f4["image_tensors"], model.config.vision_config)
    ids = f4["text_ids"]

    output = model(ids, f4["attention_mask"], pixel_values=pixel_values, document_ids=documents(ids))

    ours, official = output.last_hidden_state, f4["mm_hidden_state"]
    torch.testing.assert_close(ours[0, :29], official[0, :29], **VALUES)  # the last token is padding
    torch.testing.assert_close(ours[1, :15], official[1, :15], **VALUES)
    assert (ours[1, 15:] - official[1, 15:]).abs().max() > 0.01


# Weights of ours whose gradients have a norm in the summary under one official name.
SAME = {
    "visual_tokenizer.neg_prompt_embeds": "denoising.image_decoder.null_context",
    "text_decoder.head_new.weight": "new_head.weight",
    "text_decoder.head_new.bias": "new_head.bias",
}


def test_losses_and_gradients_are_the_official_ones(weights, diffusion_model, f5, f5_summary, draws):
    model = parity_model(weights, diffusion_model, PublishedDeem, feedback_maps=True).train()
    expected = f5_summary["cases"]["as_is"]

    output = model(**f5_inputs(f5, model), draws=draws)
    output.loss.backward()

    torch.testing.assert_close(model.denoising.feedback_head(output.image_tokens), f5["call0.cond"], **VALUES)
    torch.testing.assert_close(output.logits, f5["text_logits"], **VALUES)
    assert output.feedback_loss.item() == pytest.approx(expected["loss_sniffer"], abs=1e-5)
    assert output.lm_loss.item() == pytest.approx(expected["loss_txt"], abs=1e-5)
    assert output.image_loss.item() == pytest.approx(expected["loss_img"], abs=1e-5)
    assert output.loss.item() == pytest.approx(expected["loss"], abs=1e-4)

    gradients = {name: p.grad for name, p in model.named_parameters()}
    names = convert_state_dict(weights, START).renamed | SAME
    # The image start's vector is one row of our embedding, the only one with a gradient here.
    assert len(expected["grad_norms"]) == 445
    for name, norm in expected["grad_norms"].items():
        assert gradients[names[name]].norm().item() == pytest.approx(norm, rel=GRADIENTS, abs=1e-6), name
    start = model.config.image_start_token_id - model.config.first_new_token_id
    for name, ours in {
        "soi_token": gradients["new_embeddings.weight"][start][None],
        "context_feat_proj.weight": gradients["denoising.image_decoder.projection.weight"],
        "text_decoder.head_new.weight": gradients["new_head.weight"],
        "visual_tokenizer.neg_prompt_embeds": gradients["denoising.image_decoder.null_context"],
        "visual_tokenizer.proj_t.weight": gradients["connector.weight"],
        "visual_tokenizer.sniffer.vision_model.visual.trunk.stem.0.weight": gradients[
            "vision_tower.encoder.trunk.stem.0.weight"
        ],
    }.items():
        official = f5[f"grad.param.{name}"]
        assert (ours - official).norm() / official.norm() < GRADIENTS, name
