"""LlavaTower: the tower behind the protocol of the LLaVA code base (github.com/haotian-liu/LLaVA)."""

import torch
from torch import nn

from .build import build_vision_tower
from .image_processing import DeemImageProcessor, build_image_processor
from .tower import DeemVisionTower


class LlavaTower(nn.Module):
    """
    Takes the place of LLaVA's `CLIPVisionTower`.

    Two things differ from that class on purpose: gradients pass, and loading freezes nothing. Without them no feedback
    could reach the encoder. Where the tower shall stay as it is, call `requires_grad_(False)`.

    LLaVA's own builder knows only certain names, so a model that is to use this tower calls the class itself:
    `LlavaTower(model_args.mm_vision_tower, model_args)`.

    Args:
        vision_tower (`str`):
            Name for [`build_vision_tower`], such as `"deem"`.
        args (`object`):
            LLaVA's model arguments. Read are `mm_vision_select_layer` (-2 in LLaVA; -1 for a tower with a single
            output) and `mm_vision_select_feature` (`"patch"` or `"cls_patch"`).
        delay_load (`bool`, *optional*, defaults to `False`):
            Whether to wait for `load_model` before the weights are made.
        build_options:
            Passed on to [`build_vision_tower`], such as `pretrained`.
    """

    def __init__(self, vision_tower: str, args, delay_load: bool = False, **build_options):
        super().__init__()
        self.vision_tower_name = vision_tower
        self.select_layer = args.mm_vision_select_layer
        self.select_feature = getattr(args, "mm_vision_select_feature", "patch")
        if self.select_feature not in ("patch", "cls_patch"):
            raise ValueError(
                f"`mm_vision_select_feature` must be 'patch' or 'cls_patch', got {self.select_feature!r}."
            )
        self.build_options = build_options
        self.is_loaded = False
        if delay_load:
            # LLaVA sizes its projector before the tower is loaded.
            with torch.device("meta"):
                self.cfg_only = build_vision_tower(vision_tower, **(build_options | {"pretrained": False})).config
        else:
            self.load_model()

    def load_model(self, device_map=None):
        """Builds tower and image processor, once. `device_map` is a device, or `None` for the CPU."""
        if self.is_loaded:
            return
        self.vision_tower: DeemVisionTower = build_vision_tower(self.vision_tower_name, **self.build_options)
        if device_map is not None:
            self.vision_tower.to(device_map)
        self.image_processor: DeemImageProcessor = build_image_processor(self.vision_tower)
        self.is_loaded = True

    def feature_select(self, outputs) -> torch.Tensor:
        """Picks LLaVA's layer of the tower's output; for `"patch"` without the class token, if there is one."""
        features = outputs.hidden_states[self.select_layer]
        if self.select_feature == "patch" and self.config.class_token:
            return features[:, 1:]
        return features

    def forward(self, images: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        """
        Args:
            images (`torch.Tensor` or `list[torch.Tensor]`): Shape `(batch, 3, height, width)`, or a list of
                `(3, height, width)`.

        Returns:
            `torch.Tensor` or `list[torch.Tensor]`: Features `(batch, tokens, hidden_size)`, or a list of
            `(1, tokens, hidden_size)`, in the dtype of the images.
        """
        if isinstance(images, list):
            return [self(image[None]) for image in images]
        outputs = self.vision_tower(
            images.to(device=self.device, dtype=self.dtype), output_hidden_states=self.select_layer
        )
        return self.feature_select(outputs).to(images.dtype)

    @property
    def dummy_feature(self) -> torch.Tensor:
        """Zeros `(1, hidden_size)`, which LLaVA takes for a missing image."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The tower's dtype."""
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        """The tower's device."""
        return self.vision_tower.device

    @property
    def config(self):
        """The tower's configuration, also before the tower is loaded."""
        return self.vision_tower.config if self.is_loaded else self.cfg_only

    @property
    def hidden_size(self) -> int:
        """Width of the features."""
        return self.config.hidden_size

    @property
    def num_patches_per_side(self) -> int:
        """Patches along each side of the grid. A tower with queries has no grid, and raises a `ValueError`."""
        if self.config.num_queries:
            raise ValueError(
                f"The tower returns {self.config.num_queries} queries, which form no grid of patches. Set "
                f"`image_aspect_ratio` to 'pad' or 'square' instead of 'anyres', or build it with `num_queries=0`."
            )
        return self.config.grid_size

    @property
    def num_patches(self) -> int:
        """Number of features an image, without the class token."""
        return self.config.num_image_tokens - int(self.config.class_token)
