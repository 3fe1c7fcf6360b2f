"""An anchor to the tower as it was, against forgetting."""

import copy

import torch
import torch.nn.functional as F


class Anchor:
    """
    Measures how far a tower has moved from itself as it was when training began.

    Feedback makes a tower keep more, and nothing in it asks that what the tower knew stays where a text encoder or a
    projector looks for it: zero-shot accuracy is known to fall. The anchor holds the directions of the tokens.

    The copy is no module of the model: no state dict, optimizer or shard ever sees it.

    Args:
        tower (`nn.Module`): The vision tower, before its first step.
    """

    def __init__(self, tower):
        self.tower = copy.deepcopy(tower).requires_grad_(False).eval()

    def to(self, device):
        """Moves the copy to `device` and returns the anchor."""
        self.tower.to(device)
        return self

    def distance(self, views, inputs, read):
        """
        Args:
            views (`ImageViews`): What the tower gives now, on the autograd graph.
            inputs (`dict`): Arguments of the tower's call, by name.
            read (`Callable`): `(inputs, output) -> ImageViews`.

        Returns:
            `torch.Tensor`: 1 - cosine to what it gave at first, the mean over the tokens (and the pooled vector, where
            there is one) of each image, shape `(images,)`, float32; 0 where nothing has moved.
        """
        with torch.no_grad():
            then = read(inputs, self.tower(**inputs))
        distances = []
        for index, (now, before) in enumerate(zip(views.tokens, then.tokens, strict=True)):
            cosines = F.cosine_similarity(now.float(), before.float(), dim=-1)
            if views.pooled is not None:
                pooled = F.cosine_similarity(views.pooled[index].float(), then.pooled[index].float(), dim=-1)
                cosines = torch.cat([cosines, pooled[None]])
            distances.append(1 - cosines.mean())
        return torch.stack(distances)
