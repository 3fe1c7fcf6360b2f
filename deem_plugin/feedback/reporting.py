"""Hands the feedback loss to the experiment trackers of a stock `Trainer`."""

import os
from pathlib import Path


class Reporter:
    """
    Sends values to the trackers named in `args.report_to` (TensorBoard, W&B, ...), made once a run.

    A Trainer calls its trackers before the callbacks of its user, so what a callback adds to `logs` comes too late for
    them. They all attach to the run that is open in the process (W&B, MLflow, Comet), so that a second instance of the
    stock tracker callback writes to the same run; TensorBoard, which reads one writer a folder, gets a folder
    `feedback` within that of the run.
    """

    def __init__(self):
        self.trackers = None

    def report(self, values, args, state, control, model):
        """Sends `values` (`dict[str, float]`); the rest as a `TrainerCallback` gets it."""
        if not state.is_world_process_zero:
            return
        if self.trackers is None:
            self.trackers = _trackers(args)
        for tracker in self.trackers:
            tracker.on_log(args, state, control, logs=dict(values), model=model)

    def close(self):
        """Ends the run."""
        from transformers.integrations import TensorBoardCallback

        for tracker in self.trackers or ():
            if isinstance(tracker, TensorBoardCallback) and tracker.tb_writer is not None:
                tracker.tb_writer.close()
        self.trackers = None


def _trackers(args):
    from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

    trackers = []
    for tracker_class in get_reporting_integration_callbacks(args.report_to):
        tracker = tracker_class()
        if isinstance(tracker, TensorBoardCallback):
            runs = sorted(Path(tracker.logging_dir or args.output_dir).glob("runs/*/"), key=os.path.getmtime)
            folder = runs[-1] if runs else Path(args.output_dir)
            tracker.logging_dir = str(folder / "feedback")
        trackers.append(tracker)
    return trackers
