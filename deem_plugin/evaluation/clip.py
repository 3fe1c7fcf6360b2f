"""A whole CLIP, of open_clip or of Hugging Face, as two functions: pictures to features and texts to features."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from deem_plugin.files import naming_the_checkpoint
from deem_plugin.hub import at_revision


@dataclass
class Clip:
    """
    A CLIP in eval mode, in float32.

    Args:
        model (`nn.Module`): The model that both functions call.
        preprocess (`Callable`): Maps RGB pictures to `pixel_values` `(batch, 3, height, width)`.
        embed_images (`Callable`): Maps `pixel_values` to features `(batch, dim)`, of any length.
        embed_texts (`Callable`): Maps texts to features `(batch, dim)`, of any length.
        preprocessing (`dict`): The settings of `preprocess`, for the record.
        logit_scale (`float`): Factor on the cosine similarity, the inverse of the temperature (100 in OpenAI's).
        device (`torch.device`): Where the model is.
    """

    model: nn.Module
    preprocess: Callable[[list[Image.Image]], torch.Tensor]
    embed_images: Callable[[torch.Tensor], torch.Tensor]
    embed_texts: Callable[[list[str]], torch.Tensor]
    preprocessing: dict[str, Any]
    logit_scale: float
    device: torch.device

    @torch.inference_mode()
    def image_features(self, images: list[Image.Image]) -> torch.Tensor:
        """Maps RGB pictures to features `(batch, dim)` of unit length, float32, on the CPU."""
        features = self.embed_images(self.preprocess(images).to(self.device))
        return nn.functional.normalize(features.float(), dim=-1).cpu()

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str], batch_size: int = 64, normalize: bool = True) -> torch.Tensor:
        """Maps texts to features `(texts, dim)`, float32, on the CPU; of unit length unless `normalize` is off."""
        chunks = [list(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
        features = torch.cat([self.embed_texts(chunk).float().cpu() for chunk in chunks])
        return nn.functional.normalize(features, dim=-1) if normalize else features

    def weights_hash(self) -> str:
        """Returns the SHA-256 of the weights: names, shapes and values, whatever file they came in."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def load_clip(name: str, pretrained: str | None = None, device: str | torch.device | None = None) -> Clip:
    """
    Loads a CLIP.

    Args:
        name (`str`):
            A model name of open_clip (with `pretrained`); a folder as open_clip writes it (`open_clip_config.json`);
            or a folder or hub id of a Hugging Face CLIP or SigLIP.
        pretrained (`str`, *optional*): For a model name of open_clip: a tag of it, or a checkpoint file.
        device (`str` or `torch.device`, *optional*): By default a GPU where there is one, else the CPU.

    Raises:
        ValueError: If there is no such model, its weights are missing or incomplete, or `pretrained` does not fit it.
    """
    import open_clip

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if name in open_clip.list_models():
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained not in tags and not (pretrained and Path(pretrained).is_file()):
            raise ValueError(
                f"The open_clip model {name} needs `--pretrained`: a checkpoint file, or one of its tags "
                f"({', '.join(tags) or 'it has none'}); got {pretrained!r}."
            )
        return _open_clip(name, pretrained, device)
    if pretrained is not None:
        raise ValueError(
            f"`--pretrained` goes with a model name of open_clip; {name!r} is none (`open_clip.list_models()`), and "
            f"folders and hub ids bring their weights."
        )
    if (Path(name) / "open_clip_config.json").is_file():
        return _open_clip(f"local-dir:{name}", None, device)
    return _hugging_face(name, device)


def _open_clip(name: str, pretrained: str | None, device: torch.device) -> Clip:
    import open_clip

    try:
        model, _, transform = open_clip.create_model_and_transforms(name, pretrained=pretrained, device=device)
        tokenizer = open_clip.get_tokenizer(name)
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"Cannot load the open_clip model {name} with the weights {pretrained}: {error}") from error
    model = model.eval()
    return Clip(
        model=model,
        preprocess=lambda images: torch.stack([transform(image) for image in images]),
        embed_images=model.encode_image,
        embed_texts=lambda texts: model.encode_text(tokenizer(texts).to(device)),
        preprocessing=dict(open_clip.get_model_preprocess_cfg(model)),
        logit_scale=model.logit_scale.exp().item(),
        device=device,
    )


def _hugging_face(name: str, device: torch.device) -> Clip:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(**at_revision(name))
        if config.model_type not in ("clip", "siglip"):
            raise ValueError(
                f"{name} is a model of type {config.model_type!r}; expected a whole CLIP ('clip' or 'siglip')."
            )
        source = at_revision(name)
        with naming_the_checkpoint("model", name):
            model, info = AutoModel.from_pretrained(**source, dtype=torch.float32, output_loading_info=True)
            tokenizer, processor = (
                AutoTokenizer.from_pretrained(**source),
                AutoImageProcessor.from_pretrained(**source),
            )
    except OSError as error:
        raise ValueError(
            f"Found no whole CLIP at {name!r} ({error}). Give a folder or hub id of a Hugging Face CLIP with its "
            f"tokenizer and image processor, a folder that open_clip wrote, or a model name of open_clip."
        ) from error
    if info["missing_keys"]:
        raise ValueError(f"{name} lacks weights: {sorted(info['missing_keys'])[:5]}. Give a complete checkpoint.")
    model = model.to(device).eval()

    def embed_texts(texts: list[str]) -> torch.Tensor:
        length = config.text_config.max_position_embeddings
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        # SigLIP has learned to read its padding.
        mask = tokens["attention_mask"].to(device) if config.model_type == "clip" else None
        return model.get_text_features(tokens["input_ids"].to(device), attention_mask=mask).pooler_output

    return Clip(
        model=model,
        preprocess=lambda images: processor(images, return_tensors="pt")["pixel_values"],
        embed_images=lambda pixel_values: model.get_image_features(pixel_values).pooler_output,
        embed_texts=embed_texts,
        preprocessing=processor.to_dict(),
        logit_scale=model.logit_scale.exp().item(),
        device=device,
    )
