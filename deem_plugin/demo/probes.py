"""
Looks into a tower's tokens: what can be read from them linearly, and what the generator paints from them.

Both are measured alike for every arm on frozen tokens, whether or not the arm trained with feedback.
"""

from dataclasses import dataclass

import torch
from sklearn.linear_model import Ridge, RidgeClassifier
from tqdm.auto import tqdm

from deem_plugin.data.scenes import Scenes
from deem_plugin.feedback.conditioner import Conditioner
from deem_plugin.feedback.diffusion_feedback import DiffusionFeedback
from deem_plugin.feedback.generator import Generator
from deem_plugin.feedback.reconstruction import reconstruct
from deem_plugin.vision.hosts import find_tower

# What is read from the tokens, and from which attributes: the accuracy of a class, or the mean R2 of quantities.
CLASSES = {"shape": "shape", "background": "texture"}
QUANTITIES = {"position": ("x", "y"), "size": ("scale",)}
# Of the ridge regressions. Tokens are standardised and there are about as many values in them as pictures.
RIDGE = 60.0
# The first pictures of the second half are painted.
SHOWN = 12
READER_STEPS = 200
READER_BATCH = 64
READER_LEARNING_RATE = 1e-2


@dataclass
class TokenReport:
    """
    What is in a tower's tokens.

    Args:
        probes (`dict[str, float]`): Accuracy (shape, background) or R2 (position, size) of linear probes on pictures
            that they were not fitted on.
        denoising_error (`float`): The generator's error on such pictures when it reads the tokens.
        reconstructions (`torch.Tensor`): What it paints from them, `(pictures, 3, 16, 16)` in [0, 1].
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


def probe(tokens: torch.Tensor, scenes: Scenes) -> dict[str, float]:
    """Fits linear probes on the first half of the scenes and returns their scores on the second."""
    half = len(scenes) // 2
    values = tokens.flatten(1)
    values = (values - values[:half].mean(dim=0)) / (values[:half].std(dim=0) + 1e-4)
    seen, unseen = values[:half].numpy(), values[half:].numpy()

    def score(model, attribute: str) -> float:
        target = getattr(scenes, attribute).numpy()
        return float(model.fit(seen, target[:half]).score(unseen, target[half:]))

    scores = {name: score(RidgeClassifier(RIDGE), attribute) for name, attribute in CLASSES.items()}
    for name, attributes in QUANTITIES.items():
        scores[name] = sum(score(Ridge(RIDGE), attribute) for attribute in attributes) / len(attributes)
    return scores


def fit_reader(generator: Generator, tokens: torch.Tensor, pictures: torch.Tensor, steps: int) -> Conditioner:
    """Fits a linear layer through which the frozen generator reads frozen tokens."""
    rng = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reader = Conditioner(tokens.shape[-1], generator.denoiser.context_dim)
    feedback = DiffusionFeedback(generator.denoiser)
    latents = generator.encode(pictures)
    optimizer = torch.optim.Adam(reader.parameters(), lr=READER_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), desc="reading tokens", dynamic_ncols=True):
        chosen = torch.randint(len(tokens), (READER_BATCH,), generator=rng)
        loss = feedback(latents[chosen], reader(tokens[chosen]), generator=rng).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return reader


def look_into(
    model, processor, generator: Generator, scenes: Scenes, pictures: torch.Tensor, fast: bool = False
) -> TokenReport:
    """
    Measures a VLM's visual tokens on scenes; the first half fits probes and reader, the second half judges them.

    Args:
        model, processor: The VLM.
        generator (`Generator`): Paints from the tokens.
        scenes (`Scenes`), pictures (`torch.Tensor`): Held-out scenes without correlations; pictures in [0, 1].
        fast (`bool`): Whether a few steps must do.
    """
    half = len(scenes) // 2
    tokens = visual_tokens(model, processor, pictures)
    reader = fit_reader(generator, tokens[:half], pictures[:half], steps=5 if fast else READER_STEPS)
    with torch.no_grad():
        rng = torch.Generator().manual_seed(1)
        feedback = DiffusionFeedback(generator.denoiser)
        errors = feedback(generator.encode(pictures[half:]), reader(tokens[half:]), generator=rng)
        context = reader(tokens[half : half + SHOWN])
    painted = reconstruct(generator, context, steps=5 if fast else 50, rng=torch.Generator().manual_seed(2))
    return TokenReport(probe(tokens, scenes), errors.mean().item(), painted)
