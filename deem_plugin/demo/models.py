"""
Makes the demo's vision-language model before training: a LLaVA of half a million weights.

Its tower is a ConvNeXt that has been taught shape names by contrast, as CLIP is by captions, so that it starts with
CLIP's bias: whatever gives the name away will do. Its language model is new; some hundred steps teach it all it needs.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deem_plugin.demo.scenes import COLOR_NAMES, SHAPES, TEXTURES, Scenes
from deem_plugin.vision import DeemVisionConfig, DeemVisionTower
from deem_plugin.vision.llava import assemble_llava

from .diffusion_model import CONTEXT_TOKENS

IMAGE_SIZE = 32  # pixels; twice the diffusion model's, so that the tower sees a little more than it must restore
WIDTH = 64
# The 0.02 that weights are usually drawn with is meant for widths of a thousand; at this width nothing would start.
INITIALIZER_RANGE = 0.1

# What the benchmarks' prompts say beside the question. The tokenizer skips it: a language model of this size would
# spend most of its few hundred steps on learning to.
BOILERPLATE = (
    "please anwser yes or no",
    "answer the question using a single word or phrase",
    "in this image",
    "in the image",
    "the main object",
    r"[?.\n]",
)
WORDS = (
    ("yes", "no", "is", "there", "a", "an", "the", "object", "background", "on", "at")
    + ("left", "right", "top", "bottom", "big", "small")
    + SHAPES
    + COLOR_NAMES
    + TEXTURES
)
PAD, END, UNKNOWN, IMAGE = "<pad>", "</s>", "<unk>", "<image>"

# One turn after the other without names of the speakers: the answer follows the word that decides it.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
)

# Beside the start: the tower by itself, for methods that train an encoder first, and what its zero-shot answers need.
TOWER_FOLDER = "tower"
NAMES_FILE = "shape_names.safetensors"

PRETRAINING_STEPS = 100
PRETRAINING_BATCH = 48
PRETRAINING_TEMPERATURE = 0.1


def build_tokenizer(image_token: bool = True) -> PreTrainedTokenizerFast:
    """Makes a tokenizer with one token for each word that scenes are described with, and one for pictures if asked."""
    images = [IMAGE] if image_token else []
    vocabulary = {word: index for index, word in enumerate((PAD, END, UNKNOWN, *images, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), *(normalizers.Replace(Regex(phrase), " ") for phrase in BOILERPLATE)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=images,
        chat_template=CHAT_TEMPLATE,
        padding_side="right",
    )


def build_language_model(vocabulary_size: int, eos_token_id: int, pad_token_id: int) -> LlamaForCausalLM:
    """Makes a Llama with two layers."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary_size,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            initializer_range=INITIALIZER_RANGE,
            bos_token_id=None,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
        )
    )


def build_tower() -> DeemVisionTower:
    """Makes the tower: the first stage of a ConvNeXt, 8 x 8 tokens, read by eight queries."""
    return DeemVisionTower(
        DeemVisionConfig(
            open_clip_config={
                "timm_model_name": "convnext_atto",
                "image_size": IMAGE_SIZE,
                "timm_kwargs": {
                    "depths": [2, 0, 0, 0],
                    "dims": [WIDTH, 16, 16, 16],
                    "kernel_sizes": [5, 3, 3, 3],
                    "ls_init_value": 1.0,
                },
            },
            embed_dim=WIDTH,
            token_stage=0,
            num_queries=CONTEXT_TOKENS,
            resampler_hidden_size=WIDTH,
            resampler_num_layers=2,
            resampler_num_heads=4,
            resampler_intermediate_size=2 * WIDTH,
            cross_attention_frequency=1,
            initializer_range=INITIALIZER_RANGE,
        )
    )


class ShapeNames(nn.Module):
    """
    The text side of the tower's contrastive pretraining: one vector a shape, and a head on the mean of the patches.

    Args:
        encoder_dim (`int`): Width of the patches.
    """

    def __init__(self, encoder_dim: int):
        super().__init__()
        self.names = nn.Embedding(len(SHAPES), WIDTH)
        self.head = nn.Linear(encoder_dim, WIDTH)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Returns how well each name fits, `(pictures, shapes)`, of patches `(pictures, patches, encoder_dim)`."""
        vectors = F.normalize(self.head(patches.mean(dim=1)), dim=1)
        return vectors @ F.normalize(self.names.weight, dim=1).T / PRETRAINING_TEMPERATURE


def pretrain_tower(
    tower: DeemVisionTower, pixels: torch.Tensor, scenes: Scenes, seed: int, steps: int
) -> tuple[ShapeNames, float]:
    """
    Teaches the encoder the names of shapes by contrast, in place.

    Args:
        tower (`DeemVisionTower`): Its encoder is trained, its resampler is not.
        pixels (`torch.Tensor`): Normalised pictures `(scenes, 3, height, width)`.
        scenes (`Scenes`): Their attributes, of which only the shape is told.
        seed (`int`): Seed of the batches and of the names' embeddings.
        steps (`int`): Optimizer steps.

    Returns:
        `tuple[ShapeNames, float]`: The names as learned, and the last batch's loss.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        names = ShapeNames(tower.config.encoder_dim)
    trained = nn.ModuleList([tower.encoder, names])
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3, weight_decay=0.05)
    loss = torch.zeros(())
    for _ in tqdm(range(steps), desc="shape names", dynamic_ncols=True):
        chosen = torch.randint(len(scenes), (PRETRAINING_BATCH,), generator=generator)
        loss = F.cross_entropy(names(tower.encoder(pixels[chosen]).tokens.patches), scenes.shape[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return names, loss.item()


def build_vlm(seed: int):
    """Makes the VLM with new weights, and its processor."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        language_model = build_language_model(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
        return assemble_llava(language_model, tokenizer, build_tower())


def save_start(out: str | Path, scenes: Scenes, pictures: torch.Tensor, seed: int, steps: int) -> Path:
    """
    Makes the model that every arm of a seed starts from, and saves it with its processor.

    Args:
        out (`str` or `Path`): Folder to write.
        scenes (`Scenes`), pictures (`torch.Tensor`): The training scenes; pictures in [0, 1].
        seed (`int`): Seed of the weights.
        steps (`int`): Steps of contrastive pretraining.
    """
    model, processor = build_vlm(seed)
    tower = model.model.vision_tower
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (tower.config.image_mean, tower.config.image_std))
    names, _ = pretrain_tower(tower, (pictures - mean) / std, scenes, seed, steps)
    out = Path(out)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    tower.save_pretrained(out / TOWER_FOLDER)
    processor.image_processor.save_pretrained(out / TOWER_FOLDER)
    save_file(names.state_dict(), out / NAMES_FILE)
    return out


def load_names(start: str | Path, encoder_dim: int) -> ShapeNames:
    """Returns the shape names that a start was pretrained with."""
    names = ShapeNames(encoder_dim)
    names.load_state_dict(load_file(Path(start) / NAMES_FILE))
    return names.eval()
