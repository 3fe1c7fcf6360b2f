"""The `deem` command. Each subcommand imports its room only when it runs, so that `deem --help` answers at once."""

import argparse
import sys
from pathlib import Path


def _train(arguments) -> int:
    from .training.run import main

    return main(arguments.recipe, arguments.overrides)


def _eval(arguments) -> int:
    from .evaluation.run import evaluate

    evaluate(arguments.pretrained, arguments.tasks, arguments.out, batch_size=arguments.batch_size)
    return 0


def _import_pope(arguments) -> int:
    from .evaluation.pope import import_pope

    counts = import_pope(arguments.source, image_dir=arguments.images)
    print(f"Imported {', '.join(f'{count} {category}' for category, count in counts.items())} questions.")
    return 0


def _compare(arguments) -> int:
    from .evaluation.compare_report import main

    print(main(arguments.base, arguments.new, arguments.out, arguments.html).read_text(encoding="utf-8"))
    return 0


def _import_mmvp(arguments) -> int:
    from .evaluation.mmvp import NUM_QUESTIONS, import_mmvp

    corrected = import_mmvp(arguments.source)
    print(f"Imported {NUM_QUESTIONS} questions; {corrected} published answers were corrected.")
    return 0


def _reconstruct(arguments) -> int:
    from .feedback.reconstruction import reconstruct_files

    reconstruct_files(arguments.checkpoint, arguments.images, arguments.out, arguments.denoiser, arguments.steps)
    return 0


def _demo(arguments) -> int:
    from .demo.run import main

    return main(arguments.out, seeds=arguments.seeds, controls=arguments.controls, fast=arguments.fast)


def _lmms_tasks_dir(arguments) -> int:
    from .resources import lmms_tasks_dir

    print(lmms_tasks_dir())
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the `deem` command."""
    parser = argparse.ArgumentParser(prog="deem", description="Diffusion eyes for vision-language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train by a recipe (also under `accelerate launch` / `torchrun`)")
    train.add_argument("recipe", help="name of a shipped recipe, or path of a YAML file")
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example training.max_steps=10")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("eval", help="run lmms-eval on a checkpoint; fails when the evaluation fails")
    evaluate.add_argument("pretrained", help="checkpoint folder or hub id: any Hugging Face VLM")
    evaluate.add_argument("--tasks", default="robustvqa,pope", help="comma-separated lmms-eval tasks")
    evaluate.add_argument("--batch-size", type=int, default=16)
    evaluate.add_argument("--out", type=Path, default=Path("out/eval"), help="folder for results and samples")
    evaluate.set_defaults(run=_eval)

    data = commands.add_parser("data", help="bring benchmark data to where lmms-eval finds it offline")
    sources = data.add_subparsers(dest="source", required=True, metavar="ACTION")
    importer = sources.add_parser("import", help="import a benchmark from local files")
    benchmarks = importer.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    pope = benchmarks.add_parser("pope", help="POPE, for the stock tasks pope, pope_adv, pope_pop, pope_random")
    pope.add_argument("source", type=Path, help="folder with coco_pope_*.json, or parquet file(s)", nargs="+")
    pope.add_argument("--images", type=Path, help="folder of the COCO val2014 images (for the JSON files)")
    pope.set_defaults(run=_import_pope)
    mmvp = benchmarks.add_parser("mmvp", help="MMVP, for the stock task mmvp; swapped labels are corrected")
    mmvp.add_argument("source", type=Path, help="folder with Questions.csv and `MMVP Images`, as published")
    mmvp.set_defaults(run=_import_mmvp)

    compare = commands.add_parser("compare", help="two evaluations question by question: differences and flips")
    compare.add_argument("base", type=Path, help="folder of lmms-eval's results and sample logs, to compare with")
    compare.add_argument("new", type=Path, help="folder of the evaluation in question")
    compare.add_argument("--out", type=Path, help="folder for compare.md, .json and .png; by default that of NEW")
    compare.add_argument("--html", action="store_true", help="also a page with all flips and their images")
    compare.set_defaults(run=_compare)

    reconstruct = commands.add_parser("reconstruct", help="show what the generator sees in a checkpoint's tokens")
    reconstruct.add_argument("checkpoint", type=Path, help="folder of a VLM trained with feedback")
    reconstruct.add_argument("images", type=Path, nargs="+", help="picture files")
    reconstruct.add_argument("--out", type=Path, default=Path("out/reconstruction.png"))
    reconstruct.add_argument("--denoiser", help="generator, when it is no longer where the training run had it")
    reconstruct.add_argument("--steps", type=int, default=50, help="denoising steps")
    reconstruct.set_defaults(run=_reconstruct)

    demo = commands.add_parser("demo", help="train a small VLM with and without feedback and compare them")
    demo.add_argument("--out", type=Path, default=Path("out/demo"))
    demo.add_argument("--seeds", type=int, default=1, help="pairs of runs")
    demo.add_argument("--controls", action="store_true", help="also the arms that keep the claim honest")
    demo.add_argument("--fast", action="store_true", help="a few steps of everything, to see that it runs")
    demo.set_defaults(run=_demo)

    tasks = commands.add_parser("lmms-tasks-dir", help="print the folder of our lmms-eval tasks")
    tasks.set_defaults(run=_lmms_tasks_dir)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the `deem` command; errors that a user can mend are printed without a traceback."""
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"deem {arguments.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
