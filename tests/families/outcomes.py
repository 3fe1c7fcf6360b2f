"""What becomes of the families that do not train, and why; all others of transformers' mapping keep the contract."""

# Refused when the feedback is attached: the words of the error, and what the table in the docs says.
REFUSED = {
    "deepseek_vl_hybrid": ("two vision towers", "looks at a picture by two towers"),
    "inkling_mm_model": ("expects \\(images, 3, height, width\\)", "its tower sees patches that nobody puts together"),
    "kosmos-2.5": ("statistics of its own", "normalises each picture by statistics of its own"),
    "pix2struct": ("statistics of its own", "normalises each picture by statistics of its own"),
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
    "instructblipvideo": "refused: takes videos only",
    "pi0": "refused: drives robots",
}
