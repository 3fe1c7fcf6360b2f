"""
What a share of the pictures costs the demo: `python -m experiments.share OUT [--seeds 3]`.

Details without feedback and at shares 1, 1/2, 1/4 and 1/8, from the same starts. May be stopped and run again.
"""

import argparse
from pathlib import Path
from statistics import mean

from experiments.demo_runs import Run, details_of, summary

SHARES = (1.0, 0.5, 0.25, 0.125)


def main():
    """Runs the study and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    seeds = range(arguments.seeds)
    runs = {share: [Run(seed, share=share) for seed in seeds] for share in SHARES}
    runs = {0.0: [Run(seed, weight=0.0) for seed in seeds], **runs}
    found = details_of(arguments.out, [run for seed in seeds for run in (own[seed] for own in runs.values())])
    scores = {share: [found[run]["details"] for run in own] for share, own in runs.items()}
    base, whole = mean(scores[0.0]), mean(scores[1.0])
    print("| share | details | share of the gain |\n|---|---|---|")
    for share, own in scores.items():
        gain = f"{(mean(own) - base) / (whole - base):.0%}" if share else "–"
        print(f"| {share or 'no feedback'} | {summary(own)} | {gain} |")


if __name__ == "__main__":
    main()
