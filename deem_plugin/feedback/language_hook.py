"""The feedback at the language model's own outputs (ROSS): a hook on the decoder in place of the tower."""

import torch

from .hook import FeedbackHook
from .views import ImageViews


class LanguageHook(FeedbackHook):
    """
    Computes the feedback of what the language model says at the places of each picture's tokens, after its last norm
    (ROSS, https://arxiv.org/abs/2410.09575).

    Each place answers for its own block of the picture. Places are found by the ids of the tokens, so that padding on
    either side, several pictures in a row and rows of text alone are all the same to it; a batch of text alone costs
    nothing and counts nothing.

    Args:
        conditioner, feedback, generator, reading, mean, std, config: As in [`FeedbackHook`].
        image_token_id (`int`): Marks the places of a picture's tokens in `input_ids`.
    """

    def __init__(self, *arguments, image_token_id):
        super().__init__(*arguments)
        self.image_token_id = image_token_id
        self._input_ids = self._pixel_values = None

    def note(self, kwargs):
        """Remembers the batch that the model is about to read."""
        self._input_ids, self._pixel_values = kwargs.get("input_ids"), kwargs.get("pixel_values")

    def _views(self, inputs, output):
        """Returns the hidden states of each picture's tokens; None for text alone."""
        if self._input_ids is None:
            raise ValueError(
                "`source: llm` finds a picture's tokens by `input_ids`, and this batch came without (as "
                "`inputs_embeds`). Give the model `input_ids`, or set `feedback.source: tower`."
            )
        places = self._input_ids == self.image_token_id
        count = int(places.sum())
        if not count:
            return None
        pixel_values = self._pixel_values
        if pixel_values is None or pixel_values.dim() != 4 or count % len(pixel_values):
            given = "none" if pixel_values is None else f"shape {tuple(pixel_values.shape)}"
            raise ValueError(
                f"The batch has {count} image tokens and `pixel_values` of {given}; `source: llm` expects pictures "
                f"(images, 3, height, width) with as many tokens each. Models that cut pictures into tiles are not "
                f"known."
            )
        tokens = output.last_hidden_state[places].unflatten(0, (len(pixel_values), -1))
        return ImageViews(list(tokens), list(pixel_values.detach()))

    def _condition(self, views, rng):
        return torch.stack(views.tokens), None

    def _latents(self, views, rng):
        blocks, codec = self.feedback.denoiser, self.generator.codec
        side = blocks.cells * codec.downscale
        self.generator.picture_size = tuple(length * side for length in blocks.grid_of(len(views.tokens[0])))
        return super()._latents(views, rng)
