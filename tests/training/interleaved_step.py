"""One optimizer step of a tiny interleaved model; as a module one rank of the two-process test."""

import os
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainingArguments

from deem_plugin.data import examples
from deem_plugin.feedback import load_diffusion_model
from deem_plugin.models import Draws
from deem_plugin.training.trainer import RecipeTrainer
from tests.feedback.tiny_diffusion_models import save_diffusion_model
from tests.models.tiny_deem import official_labels, tiny_deem
from tests.tiny import tiny_image

# Texts of different length with one, three or no pictures; the first picture of the last follows `<s>` at once.
TEXTS = ["one<image>yes it is", "a<image>b<image>c<image>", "no picture here, but many words to read", "<image>x"]


def example_inputs(processor, text, index):
    images = [tiny_image(10 * index + n, size=(64, 64)) for n in range(text.count("<image>"))]
    inputs = processor(text=[text], images=images or None, return_tensors="pt")
    inputs["labels"] = official_labels(processor, inputs)
    return inputs


class Examples:
    """Collates prepared examples with their own random numbers, so that a batch can be cut anywhere."""

    def __init__(self, processor, diffusion_model):
        self.rows = [example_inputs(processor, text, index) for index, text in enumerate(TEXTS)]
        side, rng = diffusion_model.denoiser.sample_size, torch.Generator().manual_seed(3)
        self.draws = [
            {
                kind: (*torch.randn(2, n, 4, side, side, generator=rng), torch.randint(1000, (n,), generator=rng))
                for kind in ("feedback", "image")
            }
            for n in (text.count("<image>") for text in TEXTS)
        ]

    def __call__(self, indices):
        chosen = [self.rows[index["index"]] for index in indices]
        longest = max(row["input_ids"].shape[1] for row in chosen)
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        batch = {
            name: torch.cat(
                [torch.nn.functional.pad(row[name], (0, longest - row[name].shape[1]), value=value) for row in chosen]
            )
            for name, value in fill.items()
        }
        pictures = [row["pixel_values"] for row in chosen if "pixel_values" in row]
        if pictures:
            batch["pixel_values"] = torch.cat(pictures)
            parts = {
                kind: [torch.cat(part) for part in zip(*(self.draws[i["index"]][kind] for i in indices), strict=True)]
                for kind in ("feedback", "image")
            }
            batch["draws"] = {
                kind: Draws(*part, dropped=torch.zeros(len(part[2]), dtype=torch.bool)) for kind, part in parts.items()
            }
        return batch


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.values = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one_step(folder, batch_size, accumulation, order=(0, 1, 2, 3), **settings):
    """
    Trains one step on four documents of `TEXTS`, given by their places there.

    Returns:
        `tuple`: Gradients by name, and the losses that were logged.
    """
    diffusion_model = load_diffusion_model(save_diffusion_model(Path(folder) / "diffusion_model", "sd1"))
    model, processor = tiny_deem()
    model.attach_diffusion_model(diffusion_model)
    args = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        logging_steps=1,
        use_cpu=True,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        max_grad_norm=1e9,
        train_sampling_strategy="sequential",
        **settings,
    )
    kept = Gradients()
    trainer = RecipeTrainer(
        model=model,
        args=args,
        train_dataset=examples.Examples([([{"index": index} for index in order], lambda row, rng: row)]),
        data_collator=Examples(processor, diffusion_model),
        callbacks=[kept],
    )
    trainer.train()
    losses = {name: value for name, value in trainer.state.log_history[0].items() if "loss" in name}
    return kept.values, losses


def main(folder, *order):
    """Trains one document a micro-batch and rank, and saves what rank 0 has."""
    settings = {"ddp_backend": "gloo", "ddp_find_unused_parameters": True}
    gradients, losses = one_step(Path(folder) / os.environ["RANK"], 1, 2, [int(each) for each in order], **settings)
    assert torch.distributed.get_world_size() == 2
    if torch.distributed.get_rank() == 0:
        gradients = {name.removeprefix("module."): value for name, value in gradients.items()}
        torch.save((gradients, losses), Path(folder) / "rank0.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
