"""UNetSynchroniser: the way up of a diffusion UNet looks at the vision tower's multi-scale maps while it runs."""

from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from ..vision.deformable import DeformableAttention, ImageFeatures, image_features
from ..vision.grids import sincos_position_embedding
from ..vision.patches import grid_positions

# Side of the largest map at the encoder's 256 pixels, for which the official code scales offsets at any resolution.
OFFSET_MAP = 64
# Of a UNet's config, what a synchroniser asks for.
UNET_KEYS = ("sample_size", "block_out_channels", "layers_per_block")


class UNetSynchroniserBlock(GradientCheckpointingLayer):
    """
    Lets every cell of one of the UNet's feature maps look at the images around its own place.

    Args:
        channels, grid (`int`): Channels of the map, and its side at the UNet's training resolution, in whose cells
            offsets are counted.
        position_grid (`int`): Side of the grid that the position embedding is defined on.
        feature_dim (`int`): Channels of the images' maps.
        options: `inner_dim`, `num_heads`, `num_levels`, `num_points` and `max_images` of [`DeformableAttention`].
    """

    def __init__(self, channels: int, grid: int, position_grid: int, feature_dim: int, **options):
        super().__init__()
        self.position_grid = position_grid
        self.query_norm = nn.LayerNorm(channels, eps=1e-6)
        self.feature_norm = nn.LayerNorm(feature_dim, eps=1e-6)
        self.attention = DeformableAttention(
            channels, feature_dim, offset_grid=grid, offset_init=1.0, offset_map=OFFSET_MAP, **options
        )
        self.zero = nn.Linear(channels, channels)
        self.reset_parameters()

    def reset_parameters(self):
        """Zeroes the last layer, so that the UNet is what it was."""
        init.zeros_(self.zero.weight)
        init.zeros_(self.zero.bias)

    def forward(self, hidden: torch.Tensor, images: ImageFeatures) -> torch.Tensor:
        """Returns what to add to `hidden` `(batch, channels, height, width)`, in its dtype."""
        channels, *size = hidden.shape[1:]
        dtype = self.query_norm.weight.dtype
        positions = sincos_position_embedding(channels, *size, device=hidden.device, grid=self.position_grid)
        queries = self.query_norm(hidden.flatten(2).transpose(1, 2).to(dtype)) + positions.to(dtype)
        images = images._replace(tokens=self.feature_norm(images.tokens.to(dtype)))
        places = grid_positions(*size, device=hidden.device).flip(-1)[None]  # x and y
        update = self.zero(self.attention(queries, places, images))
        return update.transpose(1, 2).unflatten(2, size).to(hidden.dtype)


class UNetSynchroniser(nn.Module):
    """
    Adds what the images show to a UNet's skip features and to its middle (MMFS, https://arxiv.org/abs/2401.10208). The
    UNet's own way down and its middle block see none of it: only the way up does. Each block starts at zero.

    Args:
        unet_config: The `config` of a `UNet2DConditionModel`, of which `UNET_KEYS` are read.
        feature_dim (`int`): Channels of the images' maps.
        inner_dim, num_heads, num_levels, num_points, max_images (`int`, *optional*, defaults to 1024, 16, 4, 8 and
            10): As in [`DeformableAttention`].
    """

    def __init__(
        self,
        unet_config,
        feature_dim: int,
        inner_dim: int = 1024,
        num_heads: int = 16,
        num_levels: int = 4,
        num_points: int = 8,
        max_images: int = 10,
    ):
        super().__init__()
        options = {"inner_dim": inner_dim, "num_heads": num_heads, "num_levels": num_levels}
        options |= {"num_points": num_points, "max_images": max_images}
        side = unet_config.sample_size
        skips = skip_features(unet_config)
        self.skip_blocks = nn.ModuleList(
            UNetSynchroniserBlock(channels, side >> level, side, feature_dim, **options) for channels, level in skips
        )
        channels, level = skips[-1]
        self.middle_block = UNetSynchroniserBlock(channels, side >> level, side, feature_dim, **options)

    @contextmanager
    def attached(self, unet, maps, image_mask):
        """
        Lets `unet`, whose weights are left alone, look at the images for as long as the context lasts.

        Args:
            unet (`UNet2DConditionModel`): The denoiser's network.
            maps (`Sequence[torch.Tensor]`): One a level, each `(batch, images, feature_dim, height, width)`.
            image_mask (`torch.Tensor`): Nonzero where an image may be looked at, `(batch, images)`.
        """
        images = image_features(maps, image_mask)
        sizes = [len(block.resnets) for block in unet.up_blocks]
        if unet.mid_block is None or sum(sizes) != len(self.skip_blocks):
            raise ValueError(
                f"The synchroniser was made for a UNet with a middle block and {len(self.skip_blocks)} skip features, "
                f"but this one has {'no' if unet.mid_block is None else 'a'} middle block and {sum(sizes)} skip "
                f"features. Build it from the `config` of the UNet that it is attached to."
            )

        def add_to_middle(module, args, output):
            return output + self.middle_block(output, images)

        def add_to_skips(blocks):
            def hook(module, args, kwargs):
                skips = kwargs["res_hidden_states_tuple"]
                added = tuple(skip + block(skip, images) for skip, block in zip(skips, blocks, strict=True))
                return args, kwargs | {"res_hidden_states_tuple": added}

            return hook

        # Not by diffusers' own `down_block_additional_residuals`: those must be known before the UNet runs, while
        # these depend on what it finds.
        with ExitStack() as hooks:
            hooks.callback(unet.mid_block.register_forward_hook(add_to_middle).remove)
            blocks = list(self.skip_blocks)
            for up_block, size in zip(unet.up_blocks, sizes, strict=True):
                blocks, own = blocks[:-size], blocks[-size:]
                hook = up_block.register_forward_pre_hook(add_to_skips(own), with_kwargs=True)
                hooks.callback(hook.remove)
            yield


def skip_features(unet_config) -> list[tuple[int, int]]:
    """
    Lists channels and level of each skip feature of a UNet with this config on its way down; a level halves the side
    `level` times.
    """
    widths = unet_config.block_out_channels
    depths = unet_config.layers_per_block
    depths = [depths] * len(widths) if isinstance(depths, int) else depths
    skips = [(widths[0], 0)]
    for level, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        skips += [(width, level)] * depth
        if level < len(widths) - 1:
            skips.append((width, level + 1))
    return skips
