"""An anchor to the tower as it was, against forgetting."""

import copy
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model

FILE_NAME = "feedback_anchor.safetensors"


class Anchor:
    """
    Measures how far a tower has moved from itself as it was when training began, before its first step.

    Feedback makes a tower keep more, and nothing in it asks that what the tower knew stays where a text encoder or a
    projector looks for it: zero-shot accuracy is known to fall. The anchor holds the directions of the tokens. Its
    copy is no module of the model: no state dict, optimizer or shard ever sees it.
    """

    def __init__(self, tower):
        self.tower = copy.deepcopy(tower).requires_grad_(False).eval()

    def to(self, device):
        """Moves the copy to `device` and returns the anchor."""
        self.tower.to(device)
        return self

    def save(self, folder):
        """Keeps the copy in `folder`, for a run that is resumed from a tower that has moved."""
        path = Path(folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        save_model(self.tower, f"{path}.partial")
        os.replace(f"{path}.partial", path)

    def load(self, folder):
        """Takes the copy that a run kept in `folder` when it began; raises a `FileNotFoundError` without one."""
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"A run with `anchor_weight` resumes, but {folder} holds no {FILE_NAME}, the tower as it was when the "
                f"run began. Resume in the run's own output folder, or copy that file into this one."
            )
        load_model(self.tower, path, device=str(next(self.tower.parameters()).device))

    def distance(self, views, args, kwargs, source, state):
        """
        Returns how far the views of a call (with its arguments, source and state) are from what the tower gave at
        first: 1 - cosine, the mean over the tokens (and the pooled vector, where there is one) of each view and over
        the views of each image, summed over the images, float32. With stochastic depth or dropout it is not 0 at the
        start, for the copy is in evaluation mode.
        """
        with torch.no_grad():
            output = self.tower(*args, **kwargs)
        before = source.views(args, kwargs, output, state)
        images = [view.image for view in views]
        total = 0.0
        for now, then in zip(views, before, strict=True):
            cosines = F.cosine_similarity(now.tokens.float(), then.tokens.float(), dim=-1)
            if now.pooled is not None:
                pooled = F.cosine_similarity(now.pooled.float(), then.pooled.float(), dim=-1)
                cosines = torch.cat([cosines, pooled[None]])
            total = total + (1 - cosines.mean()) / images.count(now.image)
        return total
