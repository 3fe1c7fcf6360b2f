"""
Procedural scenes: one coloured shape on a patterned background, with captions and yes/no questions.

A whole vision-language experiment fits into seconds with them, because everything about a picture is known and can be
decoupled at will. With `correlation` above zero the colour and the background give the shape away, which is the
shortcut that robustness benchmarks are about; with `misleading=True` they point to another shape. Positions are in
units of half the picture, from the centre, x to the right and y downwards; angles are in radians.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

SHAPES = ("circle", "square", "triangle", "star", "plus", "ring", "bar", "moon")
COLORS = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.75, 0.15),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.90, 0.10),
    "cyan": (0.10, 0.85, 0.90),
    "magenta": (0.90, 0.15, 0.85),
    "orange": (0.98, 0.55, 0.05),
    "white": (0.95, 0.95, 0.95),
}
COLOR_NAMES = tuple(COLORS)
TEXTURES = ("plain", "striped", "checkered", "shaded")
RENDITIONS = ("photo", "outline", "grey", "inverted")

MAX_OFFSET = 0.2
MIN_SCALE, MAX_SCALE = 0.5, 0.8
MAX_ANGLE = 0.8
# Background colour that goes with a shape: shifted, so that object and background never share theirs by construction.
BACKGROUND_SHIFT = 3
# Pictures are drawn at twice their size and averaged, which softens edges and textures alike.
SUPERSAMPLING = 2


@dataclass(frozen=True)
class Scenes:
    """
    Attributes of a batch of scenes, each a tensor of shape `(scenes,)`.

    Args:
        shape (`torch.Tensor`): Index into `SHAPES`.
        decoy (`torch.Tensor`): Index of another shape: the one that colour and background hint at if misleading.
        color (`torch.Tensor`): Index into `COLOR_NAMES`, of the object.
        texture (`torch.Tensor`): Index into `TEXTURES`, of the background.
        background (`torch.Tensor`): Index into `COLOR_NAMES`, of the background (drawn much darker).
        x, y (`torch.Tensor`): Centre of the object, within `MAX_OFFSET` of the picture's.
        scale (`torch.Tensor`): Size of the object, from `MIN_SCALE` to `MAX_SCALE` of half the picture.
        angle (`torch.Tensor`): Rotation in radians, within `MAX_ANGLE`.
        phase (`torch.Tensor`): Shift of the texture, in radians of its period.
    """

    shape: torch.Tensor
    decoy: torch.Tensor
    color: torch.Tensor
    texture: torch.Tensor
    background: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    scale: torch.Tensor
    angle: torch.Tensor
    phase: torch.Tensor

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, index) -> "Scenes":
        """Selects scenes by a slice or by a tensor of indices."""
        return Scenes(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


def sample_scenes(
    count: int, generator: torch.Generator, *, correlation: float = 0.0, misleading: bool = False
) -> Scenes:
    """
    Draws scenes at random.

    Args:
        count (`int`): Number of scenes.
        generator (`torch.Generator`): Source of all randomness.
        correlation (`float`): Probability that the colour follows the shape, and likewise, drawn independently, the
            texture and the colour of the background. What does not follow is uniform.
        misleading (`bool`): Whether they follow the decoy in place of the shape.
    """
    if not 0.0 <= correlation <= 1.0:
        raise ValueError(f"`correlation` is a probability and must lie in [0, 1], got {correlation}.")
    kinds = len(SHAPES)

    def index(high: int) -> torch.Tensor:
        return torch.randint(high, (count,), generator=generator)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    shape = index(kinds)
    decoy = (shape + 1 + index(kinds - 1)) % kinds
    hint = decoy if misleading else shape

    def following(value: torch.Tensor, high: int) -> torch.Tensor:
        return torch.where(uniform(0.0, 1.0) < correlation, value % high, index(high))

    return Scenes(
        shape=shape,
        decoy=decoy,
        color=following(hint, len(COLORS)),
        texture=following(hint, len(TEXTURES)),
        background=following(hint + BACKGROUND_SHIFT, len(COLORS)),
        x=uniform(-MAX_OFFSET, MAX_OFFSET),
        y=uniform(-MAX_OFFSET, MAX_OFFSET),
        scale=uniform(MIN_SCALE, MAX_SCALE),
        angle=uniform(-MAX_ANGLE, MAX_ANGLE),
        phase=uniform(0.0, 2 * math.pi),
    )


def _polygon(u: torch.Tensor, v: torch.Tensor, sides: int, radius: float) -> torch.Tensor:
    """Distance to a regular polygon whose sides lie `radius` from the centre."""
    sector = 2 * math.pi / sides
    angle = (torch.atan2(v, u) + sector / 2) % sector - sector / 2
    return (u * u + v * v).sqrt() * torch.cos(angle) - radius


def signed_distance(shape: str, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Signed distance (negative inside) of points to a shape of about unit radius; approximate off the outline."""
    radius = (u * u + v * v).sqrt()
    if shape == "circle":
        return radius - 0.85
    if shape == "square":
        return torch.maximum(u.abs(), v.abs()) - 0.75
    if shape == "triangle":
        return _polygon(u, v, sides=3, radius=0.5)
    if shape == "star":
        return (radius - (0.62 + 0.33 * torch.cos(5 * torch.atan2(v, u)))) * 0.7
    if shape == "plus":
        return torch.maximum(torch.minimum(u.abs(), v.abs()) - 0.28, torch.maximum(u.abs(), v.abs()) - 0.95)
    if shape == "ring":
        return (radius - 0.7).abs() - 0.22
    if shape == "bar":
        return torch.maximum(u.abs() - 1.0, v.abs() - 0.33)
    if shape == "moon":
        return torch.maximum(radius - 0.92, 0.68 - ((u - 0.45) ** 2 + v * v).sqrt())
    raise ValueError(f"There is no shape {shape!r}; choose one of {', '.join(SHAPES)}.")


def _texture(name: str, x: torch.Tensor, y: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
    """
    Darkness in [0, 1] of a background texture at points `x`, `y` in [-1, 1]; three periods across the picture.

    The result has the shape of `x`, `y` and `phase` broadcast together, or one that broadcasts to it.
    """
    frequency = 3 * math.pi
    if name == "plain":
        return torch.zeros(())
    if name == "striped":
        return (torch.sin(frequency * y + phase) > 0).float()
    if name == "checkered":
        return (torch.sin(frequency * x + phase) * torch.sin(frequency * y) > 0).float()
    if name == "shaded":
        return (y + 1) / 2
    raise ValueError(f"There is no texture {name!r}; choose one of {', '.join(TEXTURES)}.")


def render_scenes(
    scenes: Scenes, size: int = 16, rendition: str = "photo", generator: torch.Generator | None = None
) -> torch.Tensor:
    """
    Draws scenes from signed distance functions.

    Args:
        scenes (`Scenes`): What to draw.
        size (`int`): Height and width in pixels.
        rendition (`str`): `photo`, or one of the changed styles `outline`, `grey` and `inverted`.
        generator (`torch.Generator`, *optional*): Source of a little pixel noise; none is added without it.

    Returns:
        `torch.Tensor`: Pictures in [0, 1], shape `(scenes, 3, size, size)`.
    """
    if rendition not in RENDITIONS:
        raise ValueError(f"There is no rendition {rendition!r}; choose one of {', '.join(RENDITIONS)}.")
    grid = size * SUPERSAMPLING
    axis = (torch.arange(grid) + 0.5) / grid * 2 - 1
    y, x = axis.view(1, grid, 1), axis.view(1, 1, grid)

    def per_scene(value: torch.Tensor) -> torch.Tensor:
        return value.view(-1, 1, 1)

    dx, dy = x - per_scene(scenes.x), y - per_scene(scenes.y)
    cos, sin, scale = (per_scene(value) for value in (scenes.angle.cos(), scenes.angle.sin(), scenes.scale))
    u, v = (cos * dx + sin * dy) / scale, (cos * dy - sin * dx) / scale

    distance, darkness = torch.empty_like(u), torch.zeros_like(u)
    for index, name in enumerate(SHAPES):
        chosen = scenes.shape == index
        distance[chosen] = signed_distance(name, u[chosen], v[chosen])
    for index, name in enumerate(TEXTURES):
        chosen = scenes.texture == index
        darkness[chosen] += _texture(name, x, y, per_scene(scenes.phase[chosen]))

    distance = distance * scale * grid / 2  # in drawn pixels
    line = grid / 32  # the outline keeps its share of the picture at any size
    if rendition == "outline":
        distance = (distance + 0.9 * line).abs() - 1.1 * line
    cover = torch.sigmoid(-2.5 * distance).unsqueeze(1)

    palette = torch.tensor(list(COLORS.values()))
    ground = (0.18 + 0.30 * palette[scenes.background])[:, :, None, None] * (1 - 0.55 * darkness.unsqueeze(1))
    paint = palette[scenes.color]
    if rendition == "grey":
        paint = 0.65 + 0.2 * paint.mean(1, keepdim=True).expand(-1, 3)
    picture = ground * (1 - cover) + paint[:, :, None, None] * cover
    if rendition == "inverted":
        picture = 1 - picture
    if generator is not None:
        picture = picture + 0.03 * torch.randn(picture.shape, generator=generator)
    return F.avg_pool2d(picture.clamp(0, 1), SUPERSAMPLING)


def captions(scenes: Scenes) -> list[str]:
    """Says what is in each scene in a few words: `a red square`."""
    return [f"a {COLOR_NAMES[c]} {SHAPES[s]}" for c, s in zip(scenes.color, scenes.shape, strict=True)]


def detail_questions(scenes: Scenes) -> list[list[tuple[str, str]]]:
    """
    Asks of each scene what no caption says: where the object is, how big, and on what background.

    Returns:
        For each scene four pairs of questions `(answered by yes, answered by no)` that differ in one word: on
        left/right, top/bottom, big/small and the texture of the background.
    """
    middle = (MIN_SCALE + MAX_SCALE) / 2
    questions = []
    for i in range(len(scenes)):
        horizontal = ("left", "right") if scenes.x[i] < 0 else ("right", "left")
        vertical = ("top", "bottom") if scenes.y[i] < 0 else ("bottom", "top")
        sizes = ("big", "small") if scenes.scale[i] > middle else ("small", "big")
        texture = int(scenes.texture[i])
        # Any of the three other textures; which one follows the shape, so that no further randomness is needed.
        other = (texture + 1 + int(scenes.shape[i]) % (len(TEXTURES) - 1)) % len(TEXTURES)
        forms = (
            ("Is the object on the {}?", horizontal),
            ("Is the object at the {}?", vertical),
            ("Is the object {}?", sizes),
            ("Is the background {}?", (TEXTURES[texture], TEXTURES[other])),
        )
        questions.append([(form.format(yes), form.format(no)) for form, (yes, no) in forms])
    return questions
