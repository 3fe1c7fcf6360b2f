"""
One `balance` beside the weight tuned for each setting: `python -m experiments.balance OUT [--steps 250 300]`.

Details on the demo's scenes at three learning rates and, as if of other denoisers, three scales of the loss. A loss of
another scale with a fixed weight is the same loss with another weight: only `balance`, which starts at the same weight
everywhere, is run at each scale. May be stopped and run again.
"""

import argparse
from pathlib import Path
from statistics import mean

from experiments.demo_runs import Run, details_of

LEARNING_RATES = (2.5e-4, 5e-4, 1e-3)
WEIGHTS = (0.0, 0.5, 5.0, 50.0)
SCALES = (0.1, 1.0, 10.0)


def main():
    """Runs the study and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--balance", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--steps", type=int, nargs=2, default=(250, 300), help="of the two stages; the demo has 500 600"
    )
    arguments = parser.parse_args()
    common = [{"seed": seed, "steps": tuple(arguments.steps)} for seed in range(arguments.seeds)]
    columns = {f"weight {weight:g}": {"weight": weight} for weight in WEIGHTS}
    columns |= {
        f"balance {arguments.balance:g}, loss x {scale:g}": {"balance": arguments.balance, "loss_scale": scale}
        for scale in SCALES
    }
    cells = {
        (rate, name): [Run(learning_rate=rate, **settings, **own) for own in common]
        for rate in LEARNING_RATES
        for name, settings in columns.items()
    }
    found = details_of(arguments.out, [run for runs in cells.values() for run in runs])
    print(f"| learning rate | {' | '.join(columns)} |\n{'|---' * (len(columns) + 1)}|")
    for rate in LEARNING_RATES:
        scores = [mean(found[run]["details"] for run in cells[rate, name]) for name in columns]
        print(f"| {rate:g} | {' | '.join(f'{score:.3f}' for score in scores)} |")
    for (rate, name), runs in cells.items():
        weights = [row["feedback_weight"] for row in found[runs[0]]["logs"][1] if "feedback_weight" in row]
        if weights:
            print(f"learning rate {rate:g}, {name}: weights of stage 2 from {min(weights):.3g} to {max(weights):.3g}")


if __name__ == "__main__":
    main()
