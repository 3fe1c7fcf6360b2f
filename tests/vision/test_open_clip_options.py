"""Options of open_clip's vision transformers are honoured or refused, never ignored."""

import json

import open_clip
import pytest
import torch

from deem_plugin.vision import build_vision_tower

from .towers import OPEN_CLIP_VIT, tiny_pixels

TEXT = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
OPTIONS = {
    "pool of CLIPA": {"pool_type": "avg", "final_ln_after_pool": True},
    "norm after the pool": {"final_ln_after_pool": True},
    "sinusoidal positions": {"pos_embed_type": "sin_cos_2d"},
    "attentional pool": {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4},
    "no norm before": {"no_ln_pre": True},
    "width of the feed-forward": {"mlp_ratio": 2.0},
    "epsilon of the norms": {"norm_kwargs": {"eps": 1e-2}},
    "dropped patches": {"patch_dropout": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_option_is_honoured_or_refused_by_name(tmp_path, options):
    """What is honoured gives open_clip's own embedding."""
    name = "deem-test-" + "-".join(options).replace("_", "-")
    config = {"embed_dim": 16, "text_cfg": TEXT, "vision_cfg": {**OPEN_CLIP_VIT, **options}}
    (tmp_path / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(3)
    model = open_clip.create_model(name)
    torch.save(model.state_dict(), tmp_path / "model.pt")

    try:
        tower = build_vision_tower(f"deem:{name}", pretrained=str(tmp_path / "model.pt"), num_queries=0)
    except ValueError as error:
        assert {"patch_dropout", "attentional_pool"} & set(options)
        assert any(option in str(error) for option in options)
        return

    tower.train()(tiny_pixels(tower))  # with what is dropped in training alone
    pixels = tiny_pixels(tower)
    with torch.no_grad():
        expected = model.visual.eval()(pixels)
        torch.testing.assert_close(tower.eval()(pixels).pooler_output @ model.visual.proj, expected)


def test_the_models_of_open_clip_that_pool_otherwise_become_towers():
    """The six CLIPA models pool the mean of their patches; with their sizes, on no device."""
    names = [name for name in open_clip.list_models() if "CLIPA" in name]
    assert len(names) == 6
    for name in names:
        with torch.device("meta"):
            tower = build_vision_tower(f"deem:{name}", num_queries=0)
        assert tower.encoder.trunk.pool_type == "avg"
