"""Tiny stand-ins for what recipes name, so that every recipe can run for two steps."""

from pathlib import Path

# Settings of a feedback small enough for a test.
TINY_FEEDBACK = [
    "feedback.num_queries=4",
    "feedback.resampler_dim=16",
    "feedback.resampler_heads=2",
    "feedback.image_size=null",
]


def tiny_overrides(parts: Path, out: Path, feedback: bool = True, **settings) -> list[str]:
    """Returns overrides that put the tiny parts in place of a recipe's big ones, for two steps on a CPU."""
    training = {
        "output_dir": out,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "bf16": "false",
        "tf32": "null",
        "fsdp": "null",
        "use_cpu": "true",
        "dataloader_num_workers": 0,
        "warmup_steps": 0,
        "logging_steps": 1,
        "disable_tqdm": "true",
        "seed": 1,
    }
    overrides = [f"training.{key}={value}" for key, value in training.items()]
    overrides += [f"data.path={parts / 'data.json'}", f"data.image_dir={parts / 'images'}"]
    overrides += [f"data.cache_dir={parts / 'cache'}", "model.dtype=float32"]
    if feedback:
        overrides += [f"feedback.denoiser={parts / 'sd'}", "feedback.dtype=float32", *TINY_FEEDBACK]
    return overrides + [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
