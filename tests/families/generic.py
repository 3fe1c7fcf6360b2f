"""Small configurations of families by rules alone: known names of sizes get small values, whatever the class."""

from transformers import CONFIG_MAPPING

from .vocabulary import END, HIDDEN, IMAGE, SMALL_TEXT, START, VIDEO, VISION, VOCABULARY

TEXT = {
    **SMALL_TEXT,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "index_topk": 64,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "dense_intermediate_size": 64,
    "moe_num_experts": 4,
    "moe_num_shared_experts": 1,
    "moe_k": 2,
    "sliding_window": 64,
}
TOWER = {
    **VISION,
    "image_size": 64,
    "depth": 3,
    "num_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "out_hidden_size": HIDDEN,
    "text_hidden_size": HIDDEN,
    "projection_dim": HIDDEN,
    "num_position_embeddings": 64,
    "mlp_ratio": 2.0,
    "moe_intermediate_size": 32,
    "num_local_experts": 4,
}
AUDIO = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "d_model": 32,
    "output_dim": HIDDEN,
    "out_hidden_size": HIDDEN,
    "text_hidden_size": HIDDEN,
    "adapter_out_dim": HIDDEN,
    "downsample_hidden_size": 32,
}
TOP = {
    "image_token_id": IMAGE,
    "image_token_index": IMAGE,
    "video_token_id": VIDEO,
    "video_token_index": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "boi_token_id": START,
    "eoi_token_id": END,
    "projector_hidden_size": 32,
    "projection_hidden_size": 32,
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
}


def shrunk(config_class, sizes, keeps=(), **options):
    """
    A small configuration of a class: what of `sizes` it knows, one layer of each kind, small parts, and `options`.

    Args:
        config_class (`type`): A class of configurations.
        sizes (`dict`): Small values by name.
        keeps (`Sequence[str]`): Names that stay as they are by default, also in its parts.
        options: Further values; those of a part as a dictionary, or None to leave it as it is by default.
    """
    default = config_class()
    known = set(config_class.__dataclass_fields__)
    values = {name: value for name, value in sizes.items() if name in known and name not in keeps}
    if "qk_rope_head_dim" in values:  # latent attention: each head has its own keys, of a width that is derived
        values.pop("head_dim", None)
        values["num_key_value_heads"] = values["num_attention_heads"]
    layers = getattr(default, "num_hidden_layers", None)
    lists = {name: value for name, value in vars(default).items() if isinstance(value, list) and len(value) == layers}
    kinds = lists.get("layer_types")
    places = [kinds.index(kind) for kind in dict.fromkeys(kinds)] if kinds else []
    count = max(options.get("num_hidden_layers", values.get("num_hidden_layers", 0)), len(places))
    places += [place for place in range(count) if place not in places]
    places = sorted(places[:count])
    if lists:
        values["num_hidden_layers"] = count
    values |= {name: [value[place] for place in places] for name, value in lists.items()}
    for part in config_class.sub_configs:
        given = options.pop(part, {})
        if given is None or getattr(default, part, None) is None:
            continue
        part_class = type(getattr(default, part))
        own = TEXT if "text" in part else AUDIO if "audio" in part else TOWER
        values[part] = shrunk(part_class, own, keeps, **given) if isinstance(given, dict) else given
    return config_class(**{**values, **options})


def small_config(name, **options):
    """A small configuration of a family: values of its own and, by names such as `vision_config`, of its parts."""
    return shrunk(CONFIG_MAPPING[name], TOP, **options)
