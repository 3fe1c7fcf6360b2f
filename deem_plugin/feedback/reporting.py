"""Hands the feedback loss to the experiment trackers of a `Trainer`."""

import os
from pathlib import Path


def report(values, args, state, control, model):
    """
    Sends `values` to the trackers named in `args.report_to` (TensorBoard, W&B, ...).

    A Trainer calls its trackers before the callbacks of its user, so what a callback adds to `logs` comes too late
    for them. They all attach to the run that is open in the process (W&B, MLflow, Comet), so that a second instance
    of the stock tracker callback writes to the same run; for TensorBoard it is pointed at the folder that the first
    one has opened.

    Args:
        values (`dict[str, float]`): Names and values.
        args, state, control, model: As a `TrainerCallback` gets them.
    """
    from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

    if not state.is_world_process_zero:
        return
    for tracker_class in get_reporting_integration_callbacks(args.report_to):
        tracker = tracker_class()
        if isinstance(tracker, TensorBoardCallback) and tracker.logging_dir is None:
            runs = sorted(Path(args.output_dir).glob("runs/*/"), key=os.path.getmtime)
            if not runs:
                continue
            tracker.logging_dir = str(runs[-1])
        tracker.on_log(args, state, control, logs=dict(values), model=model)
        if isinstance(tracker, TensorBoardCallback):
            tracker.tb_writer.close()
