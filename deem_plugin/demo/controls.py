"""The demo's controls: what the feedback is compared with, so that no more is claimed for it than is its own."""

from pathlib import Path

from deem_plugin.data.collator import ConversationCollator
from deem_plugin.data.conversations import load_conversations
from deem_plugin.feedback.callback import DiffusionFeedbackCallback
from deem_plugin.feedback.diffusion_feedback import DiffusionFeedback
from deem_plugin.feedback.generator import load_generator
from deem_plugin.feedback.timesteps import TIMESTEP_SAMPLERS
from deem_plugin.training.model import make_model
from deem_plugin.training.recipes import Recipe
from deem_plugin.training.trainer import RecipeTrainer

from .generator import CONTEXT_TOKENS, IMAGE_SIZE


class AnotherImage:
    """
    Feedback toward the next picture of the batch: the gradient of a denoising error that holds no information.

    What is left of the gain under it is due to the disturbance, not to what the generator knows.
    """

    def __init__(self, denoiser, sample_timesteps):
        self.feedback = DiffusionFeedback(denoiser, sample_timesteps)

    @property
    def context_dim(self) -> int:
        """Width of the context, the generator's."""
        return self.feedback.context_dim

    def __call__(self, latents, context, *, generator=None):
        """Returns the denoising error `(batch,)` of each picture's neighbour given the picture's own context."""
        return self.feedback(latents.roll(1, dims=0), context, generator=generator)


class PixelDecoder:
    """
    Reconstruction without diffusion: each token paints its share of the picture, by the conditioner's linear layer.

    What is left of the gain under it is due to restoring the picture, not to the generator.
    """

    context_dim = 3 * IMAGE_SIZE**2 // CONTEXT_TOKENS

    def __init__(self, denoiser=None, sample_timesteps=None):
        pass

    def __call__(self, latents, context, *, generator=None):
        """Returns the squared error `(batch,)` of the picture that the context `(batch, 8, 96)` paints."""
        return (context.flatten(1) - latents.flatten(1)).square().mean(dim=1)


CONTROLS = {"another-image": AnotherImage, "pixel-decoder": PixelDecoder}


def train_control(recipe: Recipe, control: str) -> Path:
    """Trains a recipe as [`~deem_plugin.training.run.train`] does, with a control in place of its feedback."""
    from transformers import set_seed

    args = recipe.training
    set_seed(args.seed)
    dataset = load_conversations(recipe.data.path, recipe.data.image_dir, recipe.data.cache_dir)
    model, processor = make_model(recipe.model)
    generator = load_generator(recipe.feedback.denoiser, recipe.feedback.dtype)
    feedback = CONTROLS[control](generator.denoiser, TIMESTEP_SAMPLERS[recipe.feedback.timestep_sampling])
    callback = DiffusionFeedbackCallback(recipe.feedback, generator=generator, feedback=feedback)
    callback.attach(model, processor)
    trainer = RecipeTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=ConversationCollator(processor, recipe.data.max_length),
        processing_class=processor,
        callbacks=[callback],
    )
    trainer.train()
    trainer.save_state()
    final = Path(args.output_dir) / "final"
    trainer.save_model(str(final))
    return final
