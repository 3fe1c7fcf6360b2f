"""
Looks into a tower's tokens: what can be read from them linearly, and what the diffusion model reconstructs from them.

Both are measured alike for every arm on frozen tokens, whether or not the arm trained with feedback.
"""

from dataclasses import dataclass

import torch
from sklearn.linear_model import Ridge, RidgeClassifier

from deem_plugin.demo.scenes import Scenes
from deem_plugin.feedback.diffusion_feedback import DiffusionFeedback
from deem_plugin.feedback.diffusion_model import DiffusionModel
from deem_plugin.vision.towers import find_tower

from .diffusion_model import PictureCode

# What is read from the tokens, and from which attributes: the accuracy of a class, or the mean R2 of quantities.
CLASSES = {"shape": "shape", "background": "texture"}
QUANTITIES = {"position": ("x", "y"), "size": ("scale",)}
# Of the ridge regressions. Tokens are standardised and there are about as many values in them as pictures.
RIDGE = 60.0
# The first pictures of the second half are reconstructed.
SHOWN = 12
RECONSTRUCTION_NOISES = 8


@dataclass
class TokenReport:
    """
    What is in a tower's tokens.

    Args:
        probes (`dict[str, float]`): Accuracy (shape, background) or R2 (position, size) of linear probes on pictures
            that they were not fitted on.
        denoising_error (`float`): The diffusion model's error on such pictures when it reads the tokens.
        reconstructions (`torch.Tensor`): What it makes of them, `(pictures, 3, 16, 16)` in [0, 1].
    """

    probes: dict[str, float]
    denoising_error: float
    reconstructions: torch.Tensor


@torch.no_grad()
def visual_tokens(model, processor, pictures: torch.Tensor, batch_size: int = 100) -> torch.Tensor:
    """Returns a VLM's visual tokens `(pictures, tokens, dim)` of pictures `(pictures, 3, height, width)` in [0, 1]."""
    tower = find_tower(model).eval()
    image_processor = processor.image_processor
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (image_processor.image_mean, image_processor.image_std))
    return torch.cat([tower((part - mean) / std).last_hidden_state for part in pictures.split(batch_size)])


@torch.no_grad()
def zero_shot(model, processor, names, scenes: Scenes, pictures: torch.Tensor, batch_size: int = 100) -> float:
    """
    Returns how often the name that the encoder was pretrained with still fits the shape best: what it has retained.

    Args:
        model, processor: The VLM.
        names (`ShapeNames`): The text side of the pretraining, unchanged since.
        scenes (`Scenes`), pictures (`torch.Tensor`): Held-out scenes; pictures in [0, 1].
    """
    tower = find_tower(model).eval()
    image_processor = processor.image_processor
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (image_processor.image_mean, image_processor.image_std))
    guesses = [
        names(tower.encoder((part - mean) / std).tokens.patches).argmax(dim=1) for part in pictures.split(batch_size)
    ]
    return (torch.cat(guesses) == scenes.shape).float().mean().item()


def standardized(tokens: torch.Tensor, fitted: int) -> torch.Tensor:
    """Returns tokens as one row a picture, with mean 0 and standard deviation 1 over the first `fitted` rows."""
    values = tokens.flatten(1)
    return (values - values[:fitted].mean(dim=0)) / (values[:fitted].std(dim=0) + 1e-4)


def probe(tokens: torch.Tensor, scenes: Scenes) -> dict[str, float]:
    """Fits linear probes on the first half of the scenes and returns their scores on the second."""
    half = len(scenes) // 2
    values = standardized(tokens, half)
    seen, unseen = values[:half].numpy(), values[half:].numpy()

    def score(model, attribute: str) -> float:
        target = getattr(scenes, attribute).numpy()
        return float(model.fit(seen, target[:half]).score(unseen, target[half:]))

    scores = {name: score(RidgeClassifier(RIDGE), attribute) for name, attribute in CLASSES.items()}
    for name, attributes in QUANTITIES.items():
        scores[name] = sum(score(Ridge(RIDGE), attribute) for attribute in attributes) / len(attributes)
    return scores


@torch.no_grad()
def read_context(code: PictureCode, tokens: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """
    Reads the diffusion model's context from tokens: a ridge regression to the code that the diffusion model was
    trained with.

    Args:
        code (`PictureCode`): The code.
        tokens (`torch.Tensor`): Tokens of all pictures, `(pictures, tokens, dim)`.
        pictures (`torch.Tensor`): The first pictures, to which the regression is fitted; in [0, 1], of 16 pixels.

    Returns:
        `torch.Tensor`: Context of the other pictures, `(pictures, 8, 64)`.
    """
    fitted = len(pictures)
    values = standardized(tokens, fitted)
    codes = code(pictures * 2 - 1)
    reader = Ridge(RIDGE).fit(values[:fitted].numpy(), codes.flatten(1).numpy())
    context = torch.from_numpy(reader.predict(values[fitted:].numpy())).float().unflatten(1, codes.shape[1:])
    # What cannot be read is near zero; the diffusion model knows contexts of unit scale only.
    return code.norm(context)


@torch.no_grad()
def reconstruct(diffusion_model: DiffusionModel, context: torch.Tensor) -> torch.Tensor:
    """
    Returns what the diffusion model expects of a picture of which it knows the context only: its estimate of the clean
    picture from pure noise (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512, Eq. 8), averaged over noises.

    Drawing samples step by step would add details that are not in the context.

    Returns:
        `torch.Tensor`: Pictures `(batch, 3, 16, 16)` in [0, 1].
    """
    denoiser = diffusion_model.denoiser
    last = denoiser.process.num_train_timesteps - 1
    alpha = denoiser.scheduler.alphas_cumprod[last]
    generator = torch.Generator().manual_seed(2)
    shape = (len(context), denoiser.channels, denoiser.sample_size, denoiser.sample_size)
    estimates = []
    for _ in range(RECONSTRUCTION_NOISES):
        noise = torch.randn(shape, generator=generator)
        velocity = denoiser(noise, torch.full((len(context),), last), context)
        estimates.append(alpha.sqrt() * noise - (1 - alpha).sqrt() * velocity)
    return diffusion_model.codec.decode(torch.stack(estimates).mean(dim=0)) / 2 + 0.5


def look_into(
    model, processor, diffusion_model: DiffusionModel, code: PictureCode, scenes: Scenes, pictures: torch.Tensor
) -> TokenReport:
    """
    Measures a VLM's visual tokens on scenes; the first half fits probes and reader, the second half scores them.

    Args:
        model, processor: The VLM.
        diffusion_model (`DiffusionModel`): Reconstructs from the tokens.
        code (`PictureCode`): The diffusion model's code.
        scenes (`Scenes`), pictures (`torch.Tensor`): Held-out scenes without correlations; pictures in [0, 1].
    """
    half = len(scenes) // 2
    tokens = visual_tokens(model, processor, pictures)
    latents = diffusion_model.encode(pictures)
    context = read_context(code, tokens, latents[:half] / 2 + 0.5)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        errors = DiffusionFeedback(diffusion_model.denoiser)(latents[half:], context, generator=generator)
    return TokenReport(probe(tokens, scenes), errors.mean().item(), reconstruct(diffusion_model, context[:SHOWN]))
