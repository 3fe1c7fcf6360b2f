"""The data of a run: skipped samples are counted from all workers and over a stop, and a check lists what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from deem_plugin.cli import main
from deem_plugin.data.examples import Examples
from deem_plugin.data.tables import BrokenSample
from deem_plugin.training.data import ExamplesTrainer

from ..tiny import tiny_image


class Recorder(torch.nn.Module):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def forward(self, values):
        self.seen += values.tolist()
        return {"loss": self.weight * values.float().mean()}


class Collator:
    """Cuts the sample of value 6."""

    cut = 0

    def __call__(self, rows):
        values = torch.tensor([row["value"] for row in rows])
        self.cut += int((values == 6).sum())
        return {"values": values}


def open_row(row, rng):
    if row["value"] % 5 == 4:
        raise BrokenSample("unreadable image", f"{row['value']} is broken")
    return row


def run(folder, samples=7, **settings):
    """Trains seven steps of two samples; returns what the model saw and the log."""
    model = Recorder()
    args = TrainingArguments(
        folder, max_steps=7, per_device_train_batch_size=2, logging_steps=1, save_steps=2, use_cpu=True, report_to=[],
        remove_unused_columns=False, **settings,
    )  # fmt: skip
    examples = Examples([([{"value": value} for value in range(samples)], open_row)], seed=3, on_error="skip")
    trainer = ExamplesTrainer(model=model, args=args, train_dataset=examples, data_collator=Collator())
    trainer.train(resume_from_checkpoint=settings.get("resume_from_checkpoint"))
    return model.seen, trainer.state.log_history


@pytest.mark.parametrize("settings", [{}, {"dataloader_num_workers": 2}, {"gradient_accumulation_steps": 2}])
def test_a_trainer_reads_each_sample_once_an_epoch_and_goes_on_after_a_stop(tmp_path, settings, caplog):
    """Two epochs of seven; the sixth step would begin in the second pass of the Trainer. One of seven is broken."""
    seen, log = run(tmp_path / "whole", **settings)
    again, resumed = run(
        tmp_path / "parts", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"), **settings
    )

    steps = settings.get("gradient_accumulation_steps", 1)
    for epoch in range(2 * steps):
        values = seen[7 * epoch : 7 * epoch + 7]
        assert set(values) == {0, 1, 2, 3, 5, 6} and len(values) == 7  # the broken one is stood in for
    assert seen[:7] != seen[7:14]
    assert again == seen[4 * 2 * steps :]
    for reason in ("unreadable_image", "end_over_max_length"):
        counts = [[entry[f"skipped_{reason}"] for entry in each if f"skipped_{reason}" in entry]
                  for each in (log, resumed)]  # fmt: skip
        assert counts[0][-1] == counts[1][-1] == 2 * steps and "Skipped in the run: " in caplog.text


@pytest.mark.slow
def test_two_processes_read_each_sample_once_an_epoch_and_count_together(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command += ["-m", "tests.training.test_data", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]

    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    # Seven steps of two samples on each of two processes: four epochs of seven.
    seen = [value for step in range(7) for rank in ranks for value in rank["seen"][2 * step : 2 * step + 2]]
    for epoch in range(4):
        assert set(seen[7 * epoch : 7 * epoch + 7]) == {0, 1, 2, 3, 5, 6}
    assert [rank["log"][6]["skipped_unreadable_image"] for rank in ranks] == [4, 4]


def test_a_run_does_not_go_on_with_other_data(tmp_path):
    run(tmp_path)

    with pytest.raises(ValueError, match=r"cannot go on: its data were .*\[7\].* and are .*\[8\].*Resume with what"):
        run(tmp_path / "other", samples=8, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_check_lists_all_that_cannot_be_used(tmp_path, capsys):
    records = [
        {
            "image": f"{name}.png",
            "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a"}],
        }
        for name in range(3)
    ] + [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    for name in range(3):
        tiny_image(name).save(tmp_path / f"{name}.png")
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "0.png").unlink()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    command = ["data", "check", "llava-1.5-7b-feedback", f"data.path={tmp_path / 'data.json'}", "data.image_dir=null"]
    command += [
        f"data.cache_dir={tmp_path / 'cache'}",
        "training.bf16=false",
        "training.tf32=null",
        "training.use_cpu=true",
    ]

    assert main([*command, f"training.output_dir={tmp_path / 'out'}"]) == 1

    first, second, last = capsys.readouterr().out.strip().split("\n")
    assert "0.png of record 0" in first and "2.png cannot be read" in second
    assert last.endswith("data.json: 2 of 4 samples; 1 without its picture, 1 unreadable image.")
    for name in (0, 2):
        (tmp_path / f"{name}.png").write_bytes(whole)
    assert main(command) == 0


if __name__ == "__main__":
    seen, log = run(sys.argv[1], ddp_backend="gloo")
    (Path(sys.argv[1]) / f"{os.environ['RANK']}.json").write_text(json.dumps({"seen": seen, "log": log}))
