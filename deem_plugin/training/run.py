"""The run of a recipe: output, data, model, feedback, Trainer, save."""

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from deem_plugin.training.checkpoint import (
    FINAL_NAME,
    check_room,
    check_writable,
    kept_room,
    resolve_resume,
    save_in_one_piece,
    train_and_keep,
)
from deem_plugin.training.recipes import Recipe, load_recipe
from deem_plugin.training.sharding import uses_fsdp

logger = logging.getLogger(__name__)


def main(name: str, overrides: Sequence[str] = ()) -> int:
    """Trains the recipe `name` with `overrides`; what `deem train` runs. Returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if int(os.environ.get("RANK", 0)) == 0:
        logging.getLogger("deem_plugin").setLevel(logging.INFO)
    recipe = load_recipe(name, overrides)
    final = train(recipe)
    command = f"deem eval-encoder {final} --zero-shot IMAGES" if recipe.model.encoder else f"deem eval {final}"
    logger.info("Saved %s; evaluate it with `%s`.", final, command)
    return 0


def train(recipe: Recipe, make_feedback: Callable | None = None) -> Path:
    """
    Trains a recipe.

    Checkpoints of the run go to `checkpoint-<step>` in the output folder, the log of the losses to
    `trainer_state.json`, and the model with its processor to `final`, which appears only when it is complete. With
    LoRA, `final` is the whole model with LoRA merged in, which loads and evaluates like any other, and
    `final/adapter` the adapter alone.

    Args:
        recipe (`Recipe`): What to train.
        make_feedback (`Callable`, *optional*):
            `(denoiser, sample_timesteps) -> feedback`, to put something else in the place of `DiffusionFeedback`.

    Returns:
        `Path`: The folder `final`.

    Raises:
        ValueError: If anything of the recipe does not fit; before the costly parts where it can be told then.
        RuntimeError: If the first step does not train what is meant to train.
    """
    from transformers import set_seed
    from transformers.trainer import TRAINING_ARGS_NAME
    from transformers.trainer_utils import SaveStrategy

    from deem_plugin.training.card import write_card

    args = recipe.training
    _check(recipe)
    check_writable(args.output_dir)
    resolve_resume(args)
    # New weights (projector, LoRA) are drawn before the Trainer exists, which seeds only itself.
    set_seed(args.seed)
    prepare = _prepare_encoder if recipe.model.encoder else _prepare_vlm
    trainer, save = prepare(recipe, make_feedback)
    _say_whether_sharded(args, trainer.accelerator.distributed_type)
    check_room(args.output_dir, trainer.model)
    final = Path(args.output_dir) / FINAL_NAME
    without_checkpoints = args.should_save and args.save_strategy == SaveStrategy.NO

    def save_with_card(folder: str):
        give_room_back()
        save(folder)
        if args.should_save:
            # A pickle, which may run any code when it is opened; the card tells all settings that are not defaults.
            (Path(folder) / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            write_card(folder, recipe, trainer.state.log_history)

    with kept_room(args.output_dir, trainer.model) if without_checkpoints else nullcontext(int) as give_room_back:
        train_and_keep(trainer)
        return save_in_one_piece(final, save_with_card, args.should_save, trainer.accelerator.wait_for_everyone)


def _check(recipe: Recipe):
    """Raises on settings that would fail only after hours."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    args = recipe.training
    if recipe.model.encoder and args.fsdp:
        raise ValueError(
            "`training.fsdp` is for VLMs: an encoder alone fits on each GPU. Leave it out (`training.fsdp=null`), and "
            "several processes train by DDP."
        )
    if recipe.feedback is not None and is_deepspeed_zero3_enabled():
        raise ValueError(
            "The feedback does not support DeepSpeed ZeRO-3. Use ZeRO-2, FSDP (`training.fsdp=true`) or DDP."
        )
    if recipe.data.kind != "conversations" and recipe.deem is None:
        raise ValueError(
            f"`data.kind: {recipe.data.kind}` is for the interleaved model alone. Add the section `deem`, or train on "
            f"conversations."
        )
    if recipe.denoiser is not None:
        raise ValueError(
            f"The recipe {recipe.name!r} has a section `denoiser`: it trains one. Run `deem train-denoiser "
            f"{recipe.name}`, or leave the section out."
        )
    if recipe.model.encoder and recipe.feedback is None:
        raise ValueError(
            "An encoder alone learns from the feedback only, and the recipe has none. Add the section `feedback` "
            "with a `diffusion_model`."
        )
    # Batches of text alone, and steps without feedback, leave the tower or the conditioner without a gradient.
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = True


def _say_whether_sharded(args, distributed_type):
    """Warns where sharding was asked for and accelerate, which shards over GPUs only, does something else."""
    from accelerate import DistributedType

    for name, asked in (("FSDP", uses_fsdp(args)), ("DEEPSPEED", args.deepspeed_plugin is not None)):
        if asked and distributed_type != DistributedType[name]:
            logger.warning(
                "%s was asked for, and accelerate shards over GPUs only; this run has none (%s). Each process holds "
                "the whole model, as with `training.fsdp=null training.deepspeed=null`.",
                name,
                distributed_type.value,
            )


def _feedback_callback(recipe: Recipe, make_feedback, model, processing_class, *, returns_loss=False):
    """Returns the feedback callback attached to the model, or None."""
    config = recipe.feedback
    if config is None:
        return None
    from deem_plugin.feedback.callback import DiffusionFeedbackCallback
    from deem_plugin.feedback.checkpoint import FILE_NAME
    from deem_plugin.feedback.config import FeedbackConfig
    from deem_plugin.feedback.factory import load_configured
    from deem_plugin.feedback.timesteps import TIMESTEP_SAMPLERS

    if make_feedback is None:
        callback = DiffusionFeedbackCallback(config)
    else:
        diffusion_model = load_configured(config.diffusion_model)
        feedback = make_feedback(diffusion_model.denoiser, TIMESTEP_SAMPLERS[config.objective.timestep_sampling])
        callback = DiffusionFeedbackCallback(config, diffusion_model, feedback)
    # Before the Trainer is made: it seeds all random numbers, so that a run without feedback draws the same ones.
    callback.attach(model, processing_class, returns_loss=returns_loss)
    # A later stage goes on with the conditioner of the stage before, or its first steps would only learn that again.
    start = recipe.model.model or recipe.model.encoder
    chosen = isinstance(config, FeedbackConfig) and config.conditioner is not None
    if not chosen and start and (Path(start) / FILE_NAME).is_file():
        callback.start_from(start)
        logger.info("The conditioner of the feedback goes on from %s.", Path(start) / FILE_NAME)
    return callback


def _move_conditioner(args, folder: str):
    """Moves the conditioner, which the callback has written to the output folder, beside the model in `folder`."""
    from deem_plugin.feedback.checkpoint import FILE_NAME

    written = Path(args.output_dir) / FILE_NAME
    if args.should_save and written.is_file():
        os.replace(written, os.path.join(folder, FILE_NAME))


def _prepare_vlm(recipe: Recipe, make_feedback):
    """Returns the Trainer of a VLM and the function that saves it."""
    from deem_plugin.data.collator import ConversationCollator
    from deem_plugin.data.document_collator import DocumentCollator
    from deem_plugin.training.data import load_examples
    from deem_plugin.training.model import make_model
    from deem_plugin.training.report import MovementCheck
    from deem_plugin.training.trainer import RecipeTrainer
    from deem_plugin.vision.towers import find_tower

    args, data = recipe.training, recipe.data
    examples = load_examples(recipe)
    model, processor = make_model(recipe.model, recipe.deem)
    collator = ConversationCollator if data.kind == "conversations" else DocumentCollator
    callback = _feedback_callback(recipe, make_feedback, model, processor)
    base = model.get_base_model() if recipe.model.lora.r else model
    callbacks = [MovementCheck(find_tower(base))] + ([callback] if callback else [])
    trainer = RecipeTrainer(
        model=model,
        args=args,
        train_dataset=examples,
        data_collator=collator(processor, data.max_length),
        processing_class=processor,
        callbacks=callbacks,
        learning_rates=recipe.model.learning_rates,
    )

    def save(folder: str):
        """Saves model, processor and conditioner; with LoRA the merged model and the adapter."""
        if not recipe.model.lora.r:
            trainer.save_model(folder)
        else:
            whole = model
            if trainer.is_fsdp_enabled:  # shards cannot be merged: put together into a model of their own
                weights = trainer.accelerator.get_state_dict(trainer.model)
                if args.should_save:
                    whole, _ = make_model(recipe.model, recipe.deem)
                    whole.load_state_dict(weights)
            if args.should_save:
                whole.save_pretrained(os.path.join(folder, "adapter"))
                whole.merge_and_unload().save_pretrained(folder)
                processor.save_pretrained(folder)
        _move_conditioner(args, folder)

    return trainer, save


def _prepare_encoder(recipe: Recipe, make_feedback):
    """Returns the Trainer of an encoder alone and the function that saves it."""
    from deem_plugin.data.image_collator import ImageCollator
    from deem_plugin.training.data import load_examples
    from deem_plugin.training.encoder import load_encoder, save_encoder
    from deem_plugin.training.model import add_lora
    from deem_plugin.training.parts import freeze
    from deem_plugin.training.report import MovementCheck
    from deem_plugin.training.trainer import EncoderTrainer

    args, data = recipe.training, recipe.data
    examples = load_examples(recipe)
    whole, tower, image_processor = load_encoder(recipe.model, recipe.feedback.condition.reads_pooled)
    model = add_lora(tower, recipe.model) if recipe.model.lora.r else tower
    freeze(model, recipe.model.freeze)
    callback = _feedback_callback(recipe, make_feedback, model, image_processor, returns_loss=True)
    trainer = EncoderTrainer(
        model=model,
        args=args,
        train_dataset=examples,
        data_collator=ImageCollator(image_processor, data.crop_area, data.target_size),
        processing_class=image_processor,
        callbacks=[MovementCheck(tower), callback],
        learning_rates=recipe.model.learning_rates,
    )

    def save(folder: str):
        """Saves the encoder in its own class, with LoRA merged in, and the conditioner."""
        if args.should_save:
            if recipe.model.lora.r:
                model.save_pretrained(os.path.join(folder, "adapter"))
                model.merge_and_unload()
            save_encoder(whole, image_processor, folder)
        _move_conditioner(args, folder)

    return trainer, save
