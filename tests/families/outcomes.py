"""What becomes of the families that do not train, and why; all others of transformers' mapping keep the contract."""

# What the errors of `attach` say.
NEWLINES = "the same number of patches for each token"
ORDER = "in an order that the feedback does not know"
TWO_CALLS = "times for one picture"
SHAPE = "expects \\(images, 3, height, width\\)"
OWN_STATISTICS = "normalisation is not known"

# Refused when the feedback is attached: the words of the error, and what the table in the docs says.
REFUSED = {
    "cosmos3_edge": (ORDER, "the layout of its patches"),
    "deepseek_ocr2": (TWO_CALLS, "calls its tower twice for a picture"),
    "deepseek_vl_hybrid": ("two vision towers", "looks at a picture by two towers"),
    "granite4_vision": ("could not be measured", "its features have no common form"),
    "granite_docling": ("expects \\(images, tokens, dim\\)", "the layout of its tokens"),
    "hunyuan_vl": (NEWLINES, "its tower adds tokens for the ends of rows"),
    "hy_v4_vl": (NEWLINES, "its tower adds tokens for the ends of rows"),
    "idefics": ("could not be measured", "takes no picture without a text"),
    "inkling2": (ORDER, "the layout of its patches"),
    "inkling2_loop": (ORDER, "the layout of its patches"),
    "inkling_mm_model": (SHAPE, "the layout of its patches"),
    "kosmos-2.5": (OWN_STATISTICS, "normalises each picture by statistics of its own"),
    "molmo2": (SHAPE, "the layout of its patches"),
    "muse_glimmer": (ORDER, "the layout of its patches"),
    "muse_spark": (ORDER, "the layout of its patches"),
    "nemotron_h_omni": (SHAPE, "the layout of its patches"),
    "pix2struct": (OWN_STATISTICS, "normalises each picture by statistics of its own"),
    "pp_formulanet": ("could not be measured", "its tower is not found"),
    "step3p7": (TWO_CALLS, "calls its tower twice for a picture"),
    "t5gemma2": (TWO_CALLS, "its tower is not found"),
    "unlimited_ocr": (TWO_CALLS, "calls its tower twice for a picture"),
    "vision-encoder-decoder": ("Found no vision tower", "its tower is not found"),
}
# Transformers itself cannot run these with a picture: the error of their forward.
BROKEN = {
    "llama4": "image_outputs",
}
# Not in transformers' mapping for what they see, or seeing without a tower that a gradient could reach.
WITHOUT_TOWER = {
    "apertus1p5": "pictures become discrete codes",
    "chameleon": "pictures become discrete codes",
    "emu3": "pictures become discrete codes",
    "evolla": "reads proteins",
    "fuyu": "encoder-free",
    "gemma4_unified": "encoder-free",
    "mistral4": "reads text only",
    "udop": "encoder-free",
}
# Have a tower, but no builder here.
UNBUILT = {
    "diffusion_gemma": "computes no loss of its own",
    "instructblipvideo": "takes videos only",
    "pi0": "drives robots",
}
