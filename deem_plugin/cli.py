"""The `deem` command. Each subcommand imports its room only when it runs, so that `deem --help` answers at once."""

import argparse
import os
import sys
import traceback
from pathlib import Path

from .children import end_forks_with_this, end_with_parent

# Package that a command imports -> the extra of deem-plugin that installs it, in a version that the command needs.
EXTRAS = {
    "datasets": "train",
    "ijson": "train",
    "open_clip": "train",
    "timm": "train",
    "transformers": "train",
    "yaml": "train",
    "lmms_eval": "lmms",
    "scipy": "lmms",
    "sklearn": "lmms",
    "torchmetrics": "lmms",
    "matplotlib": "demo",
}


def _train(arguments) -> int:
    from .training.run import main

    return main(arguments.recipe, arguments.overrides)


def _train_denoiser(arguments) -> int:
    from .training.denoiser import main

    print(main(arguments.recipe, arguments.overrides))
    return 0


def _cache_latents(arguments) -> int:
    from .training.cache import main

    print(main(arguments.recipe, arguments.overrides, batch_size=arguments.batch_size))
    return 0


def _check_data(arguments) -> int:
    from .training.data import check_data

    broken = 0
    for line, is_problem in check_data(arguments.recipe, arguments.overrides):
        print(line)
        broken += is_problem
    return 1 if broken else 0


def _plan(arguments) -> int:
    from .planning.report import main

    print(
        main(
            arguments.recipe,
            arguments.overrides,
            gpu=arguments.gpu,
            memory_gib=arguments.gpu_memory,
            gpus=arguments.gpus,
            tokens=arguments.tokens,
            picture_size=arguments.picture_size,
            out=arguments.json,
        )
    )
    return 0


def _eval(arguments) -> int:
    import lmms_eval  # noqa: F401  # runs in a process of its own, which cannot say what to install

    from .evaluation.run import evaluate

    evaluate(arguments.pretrained, arguments.passed_on, num_processes=arguments.num_processes)
    return 0


def _eval_encoder(arguments) -> int:
    from .evaluation.encoder import EncoderData
    from .evaluation.encoder_report import main

    data = EncoderData(arguments.mmvp_vlm, arguments.zero_shot, arguments.retrieval, arguments.linear_probe)
    print(
        main(
            arguments.model,
            data,
            pretrained=arguments.pretrained,
            before=arguments.before,
            out=arguments.out,
            batch_size=arguments.batch_size,
        )
    )
    return 0


def _import_pope(arguments) -> int:
    from .evaluation.pope import import_pope

    counts = import_pope(arguments.source, image_dir=arguments.images)
    print(f"Imported {', '.join(f'{count} {category}' for category, count in counts.items())} questions.")
    return 0


def _imagenet_folders(arguments) -> dict[str, Path]:
    folders = {split: getattr(arguments, f"imagenet_{split}") for split in ("a", "r", "v2")}
    return {split: folder for split, folder in folders.items() if folder is not None}


def _build_robustvqa(arguments) -> int:
    from .evaluation.robustvqa_build import build_robustvqa

    manifest = build_robustvqa(
        _imagenet_folders(arguments),
        arguments.clip,
        arguments.out,
        pretrained=arguments.pretrained,
        protocol=arguments.protocol,
        candidates=arguments.candidates,
        skip_unreadable=arguments.skip_unreadable,
        batch_size=arguments.batch_size,
    )
    for split, counts in manifest["splits"].items():
        versus = ", ".join(f"{count} {name}" for name, count in counts["pictures_by_protocol"].items())
        print(
            f"robustvqa_{split}: {counts['questions']} questions about {counts['kept']} of {counts['pictures']} "
            f"pictures, {counts['unreadable']} unreadable, {counts['refused_pairs']} synonymous pairs refused. "
            f"Corrected against official protocol, pictures: {versus}."
        )
    print(f"Content hash {manifest['content_hash']}; details in {arguments.out / 'manifest.json'}.")
    return 0


def _check_robustvqa(arguments) -> int:
    from .evaluation.robustvqa_published import check_published

    published = check_published(arguments.file, _imagenet_folders(arguments))
    for mismatch in published.mismatches:
        print(mismatch)
    entries = sum(map(len, published.entries.values()))
    print(f"{len(published.mismatches)} mismatches in {entries} entries.")
    return 1 if published.mismatches else 0


def _import_robustvqa(arguments) -> int:
    from .evaluation.robustvqa_published import import_published

    manifest = import_published(arguments.file, _imagenet_folders(arguments), arguments.out)
    for split, counts in manifest["splits"].items():
        print(f"robustvqa_{split}: {counts['questions']} questions about {counts['kept']} pictures.")
    return 0


def _compare(arguments) -> int:
    from .evaluation.compare_report import main

    print(main(arguments.base, arguments.new, arguments.out, arguments.html).read_text(encoding="utf-8"))
    return 0


def _convert_official(arguments) -> int:
    from .models.convert import convert_official

    conversion = convert_official(
        arguments.checkpoint,
        arguments.out,
        arguments.language_model,
        image_size=arguments.image_size,
        image_decoder_heads=arguments.image_decoder_heads,
        resampler_heads=arguments.resampler_heads,
    )
    print(f"{conversion.summary()}\nEach key: {arguments.out / 'conversion.json'}")
    return 0


def _import_mmvp(arguments) -> int:
    from .evaluation.mmvp import NUM_QUESTIONS, import_mmvp

    corrected = import_mmvp(arguments.source)
    print(f"Imported {NUM_QUESTIONS} questions; {corrected} published answers were corrected.")
    return 0


def _reconstruct(arguments) -> int:
    from .evaluation.reconstruction import reconstruct_files

    rows = reconstruct_files(
        arguments.checkpoint,
        arguments.images,
        arguments.out,
        arguments.diffusion_model,
        before=arguments.before,
        strength=arguments.strength,
        steps=arguments.steps,
        seed=arguments.seed,
    )
    for title, row in rows.items():
        print(f"{title}: PSNR {row.psnr:.2f} dB, SSIM {row.ssim:.3f}, cosine of the tokens {row.similarity:.3f}")
    print(f"Saved {arguments.out}.")
    return 0


def _mismatch(arguments) -> int:
    from .evaluation.mismatch_report import gap_report, write_mismatch

    if arguments.gap:
        print(gap_report(arguments.checkpoint, arguments.images, arguments.diffusion_model))
        return 0
    page = write_mismatch(
        arguments.checkpoint,
        arguments.images,
        arguments.out,
        arguments.new,
        arguments.diffusion_model,
        arguments.draws,
    )
    print(f"Saved {page} and {page.with_suffix('.parquet').name} beside it.")
    return 0


def _demo(arguments) -> int:
    if arguments.interleaved:
        from .demo.interleaved import main as interleaved

        return interleaved(arguments.out / "interleaved", fast=arguments.fast)
    from .demo.run import main

    return main(
        arguments.out,
        seeds=arguments.seeds,
        controls=arguments.controls,
        fast=arguments.fast,
        methods=arguments.methods,
    )


def _lmms_tasks_dir(arguments) -> int:
    from .resources import lmms_tasks_dir

    print(lmms_tasks_dir())
    return 0


def _count(text: str) -> int:
    """Reads a number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, got {text!r}")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the `deem` command."""
    parser = argparse.ArgumentParser(prog="deem", description="Diffusion eyes for vision-language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_training(commands)
    _add_evaluation(commands)
    _add_data(commands)
    _add_robustvqa(commands)
    _add_models(commands)
    _add_demo(commands)
    return parser


def _add_training(commands) -> None:
    train = commands.add_parser("train", help="train by a recipe (also under `accelerate launch` / `torchrun`)")
    train.add_argument("recipe", help="name of a shipped recipe, or path of a YAML file")
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example training.max_steps=10")
    train.set_defaults(run=_train)

    denoiser = commands.add_parser("train-denoiser", help="train a denoiser of your own, on images alone")
    denoiser.add_argument("recipe", help="one with a section `denoiser`, such as genhancer-denoiser")
    denoiser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as `deem train` takes them")
    denoiser.set_defaults(run=_train_denoiser)

    cache = commands.add_parser("cache-latents", help="encode a recipe's pictures once, into a latent cache")
    cache.add_argument("recipe", help="as `deem train` takes it")
    cache.add_argument("overrides", nargs="*", metavar="section.key=value", help="as `deem train` takes them")
    cache.add_argument("--batch-size", type=_count, default=16, metavar="N", help="examples that are encoded together")
    cache.set_defaults(run=_cache_latents)

    plan = commands.add_parser("plan", help="parameters, FLOPs and memory of a recipe, before a GPU is booked")
    plan.add_argument("recipe", help="as `deem train` takes it; the models it names need their configs only")
    plan.add_argument("overrides", nargs="*", metavar="section.key=value", help="as `deem train` takes them")
    plan.add_argument("--gpu", help="GPU that it shall fit, for example h100 or rtx4090")
    plan.add_argument("--gpu-memory", type=float, metavar="GIB", help="memory of a GPU that is not known by name")
    plan.add_argument("--gpus", type=_count, nargs="+", default=[1, 8], metavar="N", help="numbers of GPUs")
    plan.add_argument(
        "--tokens", type=_count, help="length of a conversation with its picture; data.max_length if left out"
    )
    plan.add_argument(
        "--picture-size",
        type=int,
        nargs=2,
        default=(448, 448),
        metavar=("WIDTH", "HEIGHT"),
        help="pixels of the pictures, for models that tile them or read them at their own resolution",
    )
    plan.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here, in bytes and FLOPs")
    plan.set_defaults(run=_plan)


def _add_evaluation(commands) -> None:
    evaluate = commands.add_parser("eval", help="run lmms-eval on a checkpoint; fails when the evaluation fails")
    evaluate.add_argument("pretrained", help="checkpoint folder or hub id: any Hugging Face VLM")
    evaluate.add_argument("--num-processes", type=_count, default=1, metavar="N", help="that share the questions")
    evaluate.usage = "deem eval [-h] [--num-processes N] PRETRAINED [-- ANY ARGUMENTS OF LMMS-EVAL]"
    evaluate.set_defaults(run=_eval)

    encoder = commands.add_parser("eval-encoder", help="score a CLIP by itself: what it won in detail, what it lost")
    encoder.add_argument("model", help="folder or hub id of a whole CLIP or SigLIP, or a model name of open_clip")
    encoder.add_argument("--pretrained", help="for a model name of open_clip: its checkpoint file or tag")
    encoder.add_argument("--before", help="an earlier model, or the JSON file of its scores, to compare with")
    encoder.add_argument("--mmvp-vlm", type=Path, metavar="FOLDER", help="MMVP-VLM, as published")
    encoder.add_argument("--zero-shot", type=Path, metavar="FOLDER", help="with one subfolder of pictures a class")
    encoder.add_argument(
        "--retrieval", type=Path, nargs=2, metavar=("CAPTIONS", "IMAGES"), help="COCO or Flickr30k, as published"
    )
    encoder.add_argument(
        "--linear-probe", type=Path, nargs=2, metavar=("FIT", "TEST"), help="folders with one subfolder a class"
    )
    encoder.add_argument("--batch-size", type=_count, default=32)
    encoder.add_argument("--out", type=Path, help="JSON file for the scores, item by item; and a plot beside it")
    encoder.set_defaults(run=_eval_encoder)

    compare = commands.add_parser("compare", help="two evaluations question by question: differences and flips")
    compare.add_argument("base", type=Path, help="folder of lmms-eval's results and sample logs, to compare with")
    compare.add_argument("new", type=Path, help="folder of the evaluation in question")
    compare.add_argument("--out", type=Path, help="folder for compare.md, .json and .png; by default that of NEW")
    compare.add_argument("--html", action="store_true", help="also a page with all flips and their images")
    compare.set_defaults(run=_compare)

    tasks = commands.add_parser("lmms-tasks-dir", help="print the folder of our lmms-eval tasks")
    tasks.set_defaults(run=_lmms_tasks_dir)


def _add_data(commands) -> None:
    data = commands.add_parser("data", help="check a recipe's data, or bring benchmarks to where lmms-eval finds them")
    sources = data.add_subparsers(dest="source", required=True, metavar="ACTION")
    check = sources.add_parser("check", help="list all records that cannot be used, missing and damaged pictures")
    check.add_argument("recipe", help="as `deem train` takes it")
    check.add_argument("overrides", nargs="*", metavar="section.key=value")
    check.set_defaults(run=_check_data)
    importer = sources.add_parser("import", help="import a benchmark from local files")
    benchmarks = importer.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    pope = benchmarks.add_parser("pope", help="POPE, for the stock tasks pope, pope_adv, pope_pop, pope_random")
    pope.add_argument("source", type=Path, help="folder with coco_pope_*.json, or parquet file(s)", nargs="+")
    pope.add_argument("--images", type=Path, help="folder of the COCO val2014 images (for the JSON files)")
    pope.set_defaults(run=_import_pope)
    mmvp = benchmarks.add_parser("mmvp", help="MMVP, for the stock task mmvp; swapped labels are corrected")
    mmvp.add_argument("source", type=Path, help="folder with Questions.csv and `MMVP Images`, as published")
    mmvp.set_defaults(run=_import_mmvp)


def _add_models(commands) -> None:
    reconstruct = commands.add_parser("reconstruct", help="sample pictures from a checkpoint's visual tokens")
    reconstruct.add_argument("checkpoint", type=Path, help="folder of a VLM trained with feedback")
    reconstruct.add_argument("images", type=Path, nargs="+", help="picture files")
    reconstruct.add_argument("--out", type=Path, default=Path("out/reconstruction.png"))
    reconstruct.add_argument("--diffusion-model", help="its folder, if it is no longer where the training run had it")
    reconstruct.add_argument("--before", type=Path, help="an earlier checkpoint, for a row of its own")
    reconstruct.add_argument(
        "--strength", type=float, default=1.0, help="noise strength in (0, 1]; 1: from pure noise"
    )
    reconstruct.add_argument("--steps", type=_count, default=50, help="denoising steps")
    reconstruct.add_argument("--seed", type=int, default=0, help="of the noise")
    reconstruct.set_defaults(run=_reconstruct)

    mismatch = commands.add_parser(
        "mismatch", help="rank pictures by how little a checkpoint's visual tokens tell of them"
    )
    mismatch.add_argument("checkpoint", type=Path, help="folder of a VLM or an encoder trained with feedback")
    mismatch.add_argument("images", type=Path, help="folder of pictures")
    mismatch.add_argument("--new", type=Path, help="a second checkpoint: what was lost and won from the first to it")
    mismatch.add_argument("--gap", action="store_true", help="instead print what the condition is worth, by timestep")
    mismatch.add_argument("--out", type=Path, default=Path("out/mismatch"), help="folder for page and table")
    mismatch.add_argument("--diffusion-model", help="its folder, if it is no longer where the training run had it")
    mismatch.add_argument("--draws", type=_count, default=16, help="noises and timesteps for each picture")
    mismatch.set_defaults(run=_mismatch)

    convert = commands.add_parser("convert-official", help="convert a checkpoint of the authors' code")
    convert.add_argument("checkpoint", type=Path, help="weights file, or folder of shards")
    convert.add_argument("out", type=Path, help="folder for model and processor")
    convert.add_argument("--language-model", default="lmsys/vicuna-7b-v1.5", help="folder or hub id it was trained on")
    convert.add_argument("--image-size", type=_count, default=256, help="the encoder's pixels; 448 behind stage 1")
    convert.add_argument("--image-decoder-heads", type=_count, default=16, help="as trained")
    convert.add_argument("--resampler-heads", type=_count, default=12, help="as trained, if it has no QK norm")
    convert.set_defaults(run=_convert_official)


def _add_demo(commands) -> None:
    demo = commands.add_parser("demo", help="train a small VLM with and without feedback and compare them")
    demo.add_argument("--out", type=Path, default=Path("out/demo"))
    demo.add_argument("--seeds", type=_count, default=1, help="pairs of runs")
    demo.add_argument("--fast", action="store_true", help="a few steps of everything, to see that it runs")
    what = demo.add_mutually_exclusive_group()
    what.add_argument("--controls", action="store_true", help="also the arms that keep the claim honest")
    what.add_argument("--methods", action="store_true", help="instead DEEM, DIVA, DCR, GenHancer, ROSS on one budget")
    what.add_argument("--interleaved", action="store_true", help="instead the paper's three stages in small")
    demo.set_defaults(run=_demo)


def _add_robustvqa(commands) -> None:
    robustvqa = commands.add_parser("robustvqa", help="build RobustVQA from ImageNet-A, -R and -V2")
    actions = robustvqa.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser("build", help="mine the questions with a CLIP; goes on where it was interrupted")
    check = actions.add_parser("check", help="compare the authors' robustvqa_test.json with its images")
    convert = actions.add_parser("import", help="convert a robustvqa_test.json that fits its images")
    for action in (check, convert):
        action.add_argument("file", type=Path, help="robustvqa_test.json")
    for action in (build, check, convert):
        action.add_argument("--imagenet-a", type=Path, metavar="DIR", help="folder of ImageNet-A's wnid folders")
        action.add_argument("--imagenet-r", type=Path, metavar="DIR", help="folder of ImageNet-R's wnid folders")
        action.add_argument("--imagenet-v2", type=Path, metavar="DIR", help="folder of ImageNet-V2's folders 0..999")
    for action in (build, convert):
        action.add_argument("--out", type=Path, required=True, help="folder for parquet files and manifest.json")
    build.add_argument("--clip", required=True, help="folder or hub id of a CLIP, or a model name of open_clip")
    build.add_argument("--pretrained", help="weights of the open_clip model: a checkpoint file or a tag")
    build.add_argument("--protocol", choices=("corrected", "official"), default="corrected")
    build.add_argument(
        "--candidates", choices=("split", "all"), help="wrong classes: of the split (default) or all 1000 (official)"
    )
    build.add_argument("--skip-unreadable", action="store_true", help="leave out pictures that cannot be read")
    build.add_argument("--batch-size", type=_count, default=64)
    build.set_defaults(run=_build_robustvqa)
    check.set_defaults(run=_check_robustvqa)
    convert.set_defaults(run=_import_robustvqa)


def is_for_the_user(error: Exception) -> bool:
    """
    Tells an error that a user can mend from a bug, of which the traceback must be seen.

    For the user is what a named file or the hub does not give, and what this package raises itself. The same type of
    error out of a library, or of an expression in our own code, is something that nobody has thought of.
    """
    if isinstance(error, OSError):
        says_of_what = error.filename is not None or error.errno is None  # `Bad file descriptor` alone does not
        return says_of_what and not isinstance(error, ConnectionError)  # another process of ours has died
    origin = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(origin.filename).is_relative_to(Path(__file__).parent)
    return ours and (origin.line or "").startswith("raise ")


def main(argv: list[str] | None = None) -> int:
    """Runs the `deem` command; errors that a user can mend are printed without a traceback, all others with it."""
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if argv[:1] == ["eval"] and "--" in argv else len(argv)
    parser = build_parser()
    arguments, unknown = parser.parse_known_args(argv[:end], argparse.Namespace(passed_on=argv[end + 1 :]))
    if unknown:
        remedy = "; put what is for lmms-eval behind `--`" if arguments.command == "eval" else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{remedy}")
    end_forks_with_this()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()  # a rank: its launcher, once killed, would leave it
    try:
        return arguments.run(arguments)
    except ImportError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        remedy = f'This command needs more than the callback does: `pip install "deem-plugin[{extra}]"`.'
        print(f"deem {arguments.command}: {error}. {remedy}", file=sys.stderr)
        return 1
    except (ValueError, OSError, RuntimeError) as error:
        if not is_for_the_user(error):
            raise
        print(f"deem {arguments.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
