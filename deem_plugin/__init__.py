"""
Diffusion eyes for any Hugging Face vision-language model (DEEM, https://arxiv.org/abs/2405.15232).

The names below are loaded on first use: `import deem_plugin` imports neither torch nor transformers.
"""

from .lazy import lazy_names

__version__ = "0.1.0"

# Public name -> module that defines it.
_PUBLIC = {
    "ConditionConfig": "deem_plugin.feedback.config",
    "Conditioner": "deem_plugin.feedback.conditioner",
    "DeemConfig": "deem_plugin.models",
    "DeemForConditionalGeneration": "deem_plugin.models",
    "DeemImageProcessor": "deem_plugin.vision",
    "DeemProcessor": "deem_plugin.models",
    "DeemVisionConfig": "deem_plugin.vision",
    "DeemVisionTower": "deem_plugin.vision",
    "DiffusionFeedback": "deem_plugin.feedback.diffusion_feedback",
    "DiffusionFeedbackCallback": "deem_plugin.feedback.callback",
    "DiffusionModelConfig": "deem_plugin.feedback.config",
    "FeedbackConfig": "deem_plugin.feedback.config",
    "ObjectiveConfig": "deem_plugin.feedback.config",
    "PerceiverResampler": "deem_plugin.vision",
    "RossConfig": "deem_plugin.feedback.config",
    "assemble_deem": "deem_plugin.models",
    "assemble_llava": "deem_plugin.vision",
    "build_vision_tower": "deem_plugin.vision",
    "generate_images": "deem_plugin.models",
    "generate_interleaved": "deem_plugin.models",
    "load_diffusion_model": "deem_plugin.feedback.diffusion_model",
}

__getattr__, __dir__, __all__ = lazy_names(__name__, _PUBLIC)
