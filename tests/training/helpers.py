"""Tiny stand-ins for what recipes name, so that every recipe can run for two steps."""

from pathlib import Path

# Settings of a feedback small enough for a test, by the section of the recipe that has it.
TINY_FEEDBACK = {
    "feedback": [
        "feedback.diffusion_model.path={sd}",
        "feedback.diffusion_model.dtype=float32",
        "feedback.diffusion_model.image_size=null",
        "feedback.diffusion_model.autoencoder=null",
        "feedback.condition.num_queries=4",
        "feedback.condition.resampler_dim=16",
        "feedback.condition.resampler_heads=2",
    ],
    "ross": ["ross.autoencoder={sd}", "ross.width=16", "ross.layers=1", "ross.heads=2"],
}


def tiny_overrides(parts: Path, out: Path, feedback: str | None = "feedback", **settings) -> list[str]:
    """
    Returns overrides that put the tiny parts in place of a recipe's big ones, for two steps on a CPU; `feedback` is
    the recipe's section of that kind.
    """
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
    overrides += [setting.format(sd=parts / "sd") for setting in TINY_FEEDBACK.get(feedback, ())]
    return overrides + [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
