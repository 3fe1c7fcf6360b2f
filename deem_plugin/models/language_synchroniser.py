"""LanguageModelSynchroniser: layers of any causal language model look at the vision tower's multi-scale maps."""

from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import nn
from transformers import initialization as init

from ..vision.deformable import DeformableAttention, ImageFeatures, image_features

# Tokens have no map of their own: their offsets are counted in sixteenths of the picture (official code).
OFFSET_GRID = 16

# Children of a decoder layer, by which the place behind its attention is found: the first one reads the residual
# stream, what the last one returns is added to it. The first line whose names are all there counts.
ATTENTION_LAYOUTS = [
    ("input_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm"),  # Gemma 2 and 3
    ("input_layernorm", "post_self_attn_layernorm"),  # GLM 4
    ("input_layernorm", "self_attn"),  # Llama, Mistral, Qwen, Phi-3 and most others
    ("input_layernorm", "attention"),  # GPT-NeoX
    ("ln_1", "attn"),  # GPT-2
]


class GatedImageAttention(nn.Module):
    """
    Lets every token look at the images it may see, from their centres on, behind a gate that starts closed.

    Args:
        hidden_dim (`int`): Width of the tokens.
        feature_dim (`int`): Channels of the images' maps, and width of the values over all heads.
        norm_eps (`float`): Epsilon of the norms.
        options: `num_heads`, `num_levels`, `num_points` and `max_images` of [`DeformableAttention`].
    """

    def __init__(self, hidden_dim: int, feature_dim: int, norm_eps: float, **options):
        super().__init__()
        self.query_norm = nn.RMSNorm(hidden_dim, eps=norm_eps)
        self.feature_norm = nn.RMSNorm(feature_dim, eps=norm_eps)
        self.attention = DeformableAttention(
            hidden_dim, feature_dim, feature_dim, offset_grid=OFFSET_GRID, offset_init=3.0, learn_null=True, **options
        )
        self.gate = nn.Parameter(torch.zeros(1))

    def reset_parameters(self):
        """Closes the gate, so that the language model is what it was."""
        init.zeros_(self.gate)

    def forward(self, hidden: torch.Tensor, images: ImageFeatures) -> torch.Tensor:
        """Returns what to add to `hidden` `(batch, tokens, hidden_dim)`, in its dtype."""
        dtype = self.query_norm.weight.dtype
        centre = torch.full((1, 1, 2), 0.5, device=hidden.device)
        images = images._replace(tokens=self.feature_norm(images.tokens.to(dtype)))
        update = self.attention(self.query_norm(hidden.to(dtype)), centre, images)
        return (update * self.gate.tanh()).to(hidden.dtype)


class LanguageModelSynchroniser(nn.Module):
    """
    Lets chosen layers of a language model look at the images' maps, between their attention and their feed-forward.

    It belongs to no class of language model: hooks add to the residual stream, see [`ATTENTION_LAYOUTS`]. At the start
    the gates are closed and nothing changes.

    Args:
        hidden_dim (`int`): Width of the language model.
        num_layers (`int`): Number of its decoder layers.
        feature_dim (`int`): Channels of the images' maps.
        frequency (`int`, *optional*, defaults to 4): Layers 0, n, 2n, ... look at the images.
        num_heads (`int`, *optional*, defaults to 16): Number of heads; must divide `feature_dim`.
        num_levels (`int`, *optional*, defaults to 3): Number of maps an image.
        num_points (`int`, *optional*, defaults to 8): Points that each head looks at on each map.
        max_images (`int`, *optional*, defaults to 50): Images a sample may have, plus one.
        norm_eps (`float`, *optional*, defaults to 1e-6): Epsilon of the norms, the language model's own.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_layers: int,
        feature_dim: int,
        frequency: int = 4,
        num_heads: int = 16,
        num_levels: int = 3,
        num_points: int = 8,
        max_images: int = 50,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        options = {
            "num_heads": num_heads,
            "num_levels": num_levels,
            "num_points": num_points,
            "max_images": max_images,
        }
        self.num_layers = num_layers
        self.blocks = nn.ModuleDict(
            {
                str(index): GatedImageAttention(hidden_dim, feature_dim, norm_eps, **options)
                for index in range(0, num_layers, frequency)
            }
        )
        self._reattach = None

    @contextmanager
    def attached(self, language_model, maps, image_mask):
        """
        Lets `language_model` look at the images for as long as the context lasts.

        Args:
            language_model (`PreTrainedModel`): Any causal language model of transformers whose layers are known.
            maps (`Sequence[torch.Tensor]`): One a level, each `(batch, images, feature_dim, height, width)`.
            image_mask (`torch.Tensor`):
                Nonzero where a token may look at an image, `(batch, tokens, images)`. Calls with a single token, as in
                generation with a cache, go by its last row.

        With gradient checkpointing the backward pass runs the layers once more, after the context has ended; enable it
        with [`~LanguageModelSynchroniser.checkpoint_contexts`] then, or torch raises a `CheckpointError`.
        """
        images = image_features(maps, image_mask)
        layers = decoder_layers(language_model, self.num_layers)

        @contextmanager
        def hooked():
            with ExitStack() as hooks:
                for index, block in self.blocks.items():
                    for hook in _add_to_residual(layers[int(index)], block, images):
                        hooks.callback(hook.remove)
                yield

        self._reattach = hooked
        try:
            with hooked():
                yield
        finally:
            self._reattach = None

    def checkpoint_contexts(self):
        """
        Keeps the images within reach of layers that are recomputed in the backward pass.

        Returns:
            `tuple`: Contexts of the forward pass and of the recomputation, as `torch.utils.checkpoint` wants them.

        Example:

        ```python
        language_model.activation_checkpointing_enable(
            {"use_reentrant": False, "context_fn": synchroniser.checkpoint_contexts}
        )
        ```
        """
        return nullcontext(), nullcontext() if self._reattach is None else self._reattach()


def decoder_layers(language_model, num_layers: int) -> nn.ModuleList:
    """Finds the decoder layers of a causal language model, or raises a `ValueError` unless there are `num_layers`."""
    lists = [child for child in language_model.get_decoder().children() if isinstance(child, nn.ModuleList)]
    if [len(layers) for layers in lists] != [num_layers]:
        raise ValueError(
            f"Expected one list of {num_layers} decoder layers in {type(language_model).__name__}, found lists of "
            f"{[len(layers) for layers in lists]}. Build the synchroniser for this model's number of layers."
        )
    return lists[0]


def _add_to_residual(layer, block, images):
    """Registers hooks that add to the residual stream of `layer`, behind its attention, and returns their handles."""
    children = dict(layer.named_children())
    layout = next((names for names in ATTENTION_LAYOUTS if children.keys() >= set(names)), None)
    if layout is None:
        raise ValueError(
            f"Where the attention of {type(layer).__name__} joins the residual stream is not known; its parts are "
            f"{sorted(children)}. Add a line for it to `ATTENTION_LAYOUTS`, which knows {ATTENTION_LAYOUTS}."
        )
    stream = []

    def read(module, args):
        stream.append(args[0])

    def add(module, args, output):
        attended, *rest = output if isinstance(output, tuple) else (output,)
        hidden = stream.pop() + attended
        looked = images._replace(mask=images.mask[:, -1:]) if hidden.shape[1] == 1 else images
        attended = attended + block(hidden, looked)
        return (attended, *rest) if isinstance(output, tuple) else attended

    return [
        children[layout[0]].register_forward_pre_hook(read),
        children[layout[-1]].register_forward_hook(add),
    ]
