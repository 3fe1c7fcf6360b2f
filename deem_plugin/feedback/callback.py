"""Diffusion feedback for the Trainer you already have: one callback."""

import logging
import math
import os
import random

from accelerate.utils import parse_flag_from_env
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from ..vision.towers import without_peft
from .checkpoint import load_by_class, read_balance, read_conditioner, save_conditioner
from .config import FeedbackConfig, RossConfig
from .factory import build_feedback
from .optimizations import pin
from .reporting import Reporter
from .state import StepState, Sums

logger = logging.getLogger(__name__)

# The attribute of the model that holds the conditioner while it trains.
CONDITIONER_NAME = "feedback_conditioner"
SUMS = ("loss", "images", "views", "nonfinite", "blank", "anchor", "anchored", "unseen")
GRADIENT_SUMS = ("text", "feedback", "product", "steps")


class DiffusionFeedbackCallback(TrainerCallback):
    """
    Trains the vision tower of any VLM with diffusion feedback (DEEM, https://arxiv.org/abs/2405.15232).

    Works with `transformers.Trainer`, its subclasses and TRL's trainers; the model, the data set and the loss stay as
    they are. `trainer.log` shows the language-model loss as before and `feedback_loss` beside it: its mean per image.

    Every image counts alike, whatever the batch is cut into: the gradient is that of `weight` times the sum over the
    images (of the mean over the views of each), divided by the conversations of the optimizer step. Batches with text
    only cost nothing.

    Args:
        config (`FeedbackConfig` or `RossConfig`): The settings.
        diffusion_model (`DiffusionModel`, *optional*):
            The frozen model, of ROSS its autoencoder alone; by default the one that the config names is loaded.
        objective (`Callable`, *optional*): `(latents, context, *, generator) -> (views,)` with an attribute
            `context_dim`; by default what the config names, on the denoiser of the diffusion model.

    Example:

        trainer = Trainer(
            model=vlm,
            processing_class=processor,
            callbacks=[DiffusionFeedbackCallback(FeedbackConfig(DiffusionModelConfig("path/or/id"), weight=5.0))],
            ...
        )
    """

    def __init__(self, config: FeedbackConfig | RossConfig, diffusion_model=None, objective=None):
        if diffusion_model is None:
            config.check_loadable()
        self.config = config
        self.diffusion_model = diffusion_model
        self.objective = objective
        self.feedback = None
        self.model = None
        self.attachment = None
        self._reporter = Reporter()
        self._resume_from = None

    @property
    def hook(self):
        """The [`FeedbackHook`]; None before [`attach`]."""
        return None if self.feedback is None else self.feedback.hook

    @property
    def conditioner(self):
        """The trained conditioner, as it is in the model while that trains; None before [`attach`]."""
        if self.attachment is not None and self.attachment.active:
            return getattr(self.model, CONDITIONER_NAME)
        return None if self.feedback is None else self.feedback.conditioner

    def attach(self, model, processing_class=None, *, returns_loss=False):
        """
        Puts the conditioner into `model` and hooks on it, once all of them are built. Called when the Trainer is made;
        call it yourself, before the optimizer exists, if you add the callback later or build the optimizer first.

        Args:
            model (`nn.Module`): The VLM, or the PEFT model around it, or a vision encoder alone.
            processing_class (`ProcessorMixin`, *optional*): Tells the normalisation of `pixel_values`.
            returns_loss (`bool`, *optional*, defaults to `False`): For trainings that own their loop: the output of an
                encoder alone then holds `feedback_loss`, its share of the step's loss with its graph, and nothing is
                injected.

        Raises:
            ValueError: If the model cannot have feedback (no vision tower or an unknown one, frozen, normalisation
                unknown), has some already, or is another than the one that the callback is attached to.
        """
        base = without_peft(model)
        if self.model is not None:
            if base is self.model:
                return
            raise ValueError(
                "This DiffusionFeedbackCallback is attached to another model. Each model needs a callback of its own: "
                "make a new one (`model_init`, which makes a new model in `train()`, is not supported), or call "
                "`callback.detach()` and make a new Trainer."
            )
        other = getattr(base, "feedback_attachment", None)
        if other is not None and not other.began:
            raise ValueError(
                "This model has the feedback of another DiffusionFeedbackCallback already. Pass one callback only, or "
                "call `detach()` on the other one first."
            )
        if returns_loss and getattr(self.config, "balance", None) is not None:
            raise ValueError("`balance` compares the feedback with text, and an encoder alone has none. Leave it out.")
        feedback = build_feedback(
            self.config, base, processing_class, self.diffusion_model, self.objective, lambda: self.conditioner
        )
        feedback.hook.returns_loss = returns_loss
        if other is not None:  # of a run that was interrupted
            other.detach()
        self.feedback, self.model = feedback, base
        self.diffusion_model, self.objective = feedback.diffusion_model, feedback.hook.loss.objective
        self.attachment = Attachment(base, feedback)
        self.attachment.attach()

    def detach(self):
        """
        Takes hooks and conditioner off the model, which then is what it was. The callback keeps the conditioner; the
        end of a training detaches by itself, and a further `trainer.train()` attaches again.
        """
        if self.attachment is not None:
            self.feedback.conditioner = self.conditioner
            self.attachment.detach()
        self._reporter.close()

    def load(self, folder):
        """
        Loads the conditioner of a run to resume from the `feedback.safetensors` in `folder`. A resumed run does so by
        itself for the checkpoints of its own `output_dir`; call it before `trainer.train` when you resume from
        elsewhere.
        """
        self.start_from(folder)
        self._resume_from = folder

    def start_from(self, folder):
        """
        Starts a new run with the conditioner (and, of [`Balance`], the norms) that an earlier one left in `folder`,
        such as its first stage.

        Raises:
            FileNotFoundError: If `folder` holds no `feedback.safetensors`.
            ValueError: If it was made with other settings than this run's.
        """
        weights = read_conditioner(folder, self.feedback.conditioner)
        # Also into the shards of FSDP, whose weights are distributed tensors.
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.conditioner, weights, options=options)
        if self.hook.balance is not None:
            self.hook.balance.text, self.hook.balance.feedback = read_balance(folder)

    def on_init_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        """Attaches to the Trainer's model."""
        self.attach(model, processing_class)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Checks that the feedback can work, and restores the conditioner of a resumed run."""
        if self.feedback is None:
            raise RuntimeError(
                "The DiffusionFeedbackCallback was added after the Trainer was made, so it is attached to nothing. "
                "Pass it as `callbacks=[...]`, or call `callback.attach(model, processor)` before `Trainer(...)`."
            )
        _check_run(args)
        if not any(module is self.model for module in model.modules()):
            raise ValueError(
                f"The Trainer trains another {type(self.model).__name__} than the one that the "
                f"DiffusionFeedbackCallback was attached to. With `model_init` a Trainer makes a new model in "
                f"`train()`: pass `model=` instead, and a new callback for each."
            )
        self.attachment.attach()
        self.attachment.began = True
        self.hook.reset()
        if not is_sharded(args):
            _check_optimizer(optimizer, self.conditioner)
        self.diffusion_model.to(args.device)
        if self.diffusion_model.cpu_offload and args.device.type == "cuda":
            pin(self.diffusion_model.modules())
        if state.global_step > 0 and self._resume_from is None:
            folder = args.resume_from_checkpoint
            if not isinstance(folder, str | os.PathLike):
                folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
            try:
                self.start_from(folder)
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"The run resumes at step {state.global_step}, but {folder} holds no conditioner. Call "
                    f"`callback.load(folder)` with the checkpoint's folder before `trainer.train(...)`."
                ) from error
        self._resume_from = None
        self._begin_anchor(args, state)

    def _begin_anchor(self, args, state):
        anchor = self.hook.anchor
        if anchor is None:
            return
        if state.global_step:
            anchor.load(args.output_dir)
        elif args.should_save:
            anchor.save(args.output_dir)
        anchor.to(args.device)

    def on_step_begin(self, args, state, control, optimizer=None, train_dataloader=None, **kwargs):
        """Makes the state of the next optimizer step: the factor on the feedback's gradient and the seed."""
        # Not multiplied by the ranks: their gradients are averaged, as is that of the language model's loss.
        micro_batches, conversations = _of_next_step(args, state, train_dataloader)
        loss_scale = 1.0
        if self.hook.returns_loss:  # the Trainer divides what is returned by the micro-batches, and scales it
            conversations /= micro_batches
        else:
            scaler = getattr(optimizer, "scaler", None)
            # Under fp16 the gradients of the loss are scaled; those of the feedback must be scaled alike.
            loss_scale = scaler.get_scale() if scaler is not None else 1.0
        balance = self.hook.balance
        weight = self.config.weight if balance is None else balance.weight
        self.hook.state = StepState(
            weight / conversations * loss_scale,
            step_seed(self.config.seed, state.global_step, args.process_index),
            loss_scale,
            # Of no rank, so that all of them restore as many images.
            offset=random.Random(step_seed(self.config.seed, state.global_step, 0)).random(),
        )

    def on_step_end(self, args, state, control, **kwargs):
        """Checks that the feedback of this step reached the tower, and balances the next step's weight."""
        self.hook.check_injected()
        self.hook.sums.add(steps=1)
        if self.hook.balance is not None:
            self.hook.balance.update(**self.hook.step_sums.take(("text", "feedback"), args.device))

    def add_to(self, logs, args):
        """
        Adds to `logs`, in place, what a training or an evaluation has summed up since the last log: `feedback_loss`
        (mean per image over all ranks), `anchor_loss`, the norms of both gradients at the tower's tokens and their
        cosine, and, where there are any, the numbers of views that were left out; returns it. All ranks must call.

        Raises:
            RuntimeError: If more than a small share of the views had no finite loss or gradient.
        """
        values = {}
        if "loss" in logs and "feedback_loss" not in logs:
            values = _training_values(self.hook, self.hook.sums.take((*SUMS, *GRADIENT_SUMS), args.device), args)
        evaluated = [name.removesuffix("_runtime") for name in logs if name.endswith("_runtime")]
        if self.config.in_eval and evaluated and evaluated != ["train"]:
            sums = self.hook.eval_sums.take(("loss", "images"), args.device)
            if sums["images"]:
                values[f"{evaluated[0]}_feedback_loss"] = sums["loss"] / sums["images"]
        logs.update(values)
        return values

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        """Adds `feedback_loss` to what is logged."""
        values = self.add_to(logs, args)
        if values:
            state.log_history[-1].update(values)
            self._reporter.report(values, args, state, control, model)

    def on_evaluate(self, args, state, control, **kwargs):
        """Lets the next evaluation draw the same noise."""
        self.hook.eval_state = StepState()

    def on_predict(self, args, state, control, **kwargs):
        """Forgets what a prediction, which logs nothing, has summed up and drawn."""
        self.hook.eval_state, self.hook.eval_sums = StepState(), Sums()

    def on_save(self, args, state, control, **kwargs):
        """Writes the conditioner beside the checkpoint that was just saved."""
        folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        save_conditioner(self.conditioner, self.config, folder, args.should_save, self.hook.balance)

    def on_train_end(self, args, state, control, **kwargs):
        """
        Writes the conditioner to the output folder, where `trainer.save_model()` puts the model (the best one, where
        the Trainer loads the best model at its end), and detaches.
        """
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.start_from(state.best_model_checkpoint)
            weights = os.path.join(state.best_model_checkpoint, "config.json")  # else an adapter, loaded by name
            if not is_sharded(args) and os.path.isfile(weights):
                load_by_class(self.model, state.best_model_checkpoint)
        save_conditioner(self.conditioner, self.config, args.output_dir, args.should_save, self.hook.balance)
        self.hook.reset()
        self.detach()


def is_sharded(args) -> bool:
    """Tells whether a run is cut over ranks by FSDP or DeepSpeed, by its arguments or those of `accelerate launch`."""
    return bool(args.fsdp) or args.deepspeed_plugin is not None or parse_flag_from_env("ACCELERATE_USE_FSDP")


def _check_optimizer(optimizer, conditioner):
    """Raises a `ValueError` if the optimizer does not train the conditioner."""
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, value in conditioner.named_parameters() if id(value) not in trained]
    if missing:
        raise ValueError(
            f"The conditioner is in no optimizer group ({len(missing)} parameters, first {missing[0]!r}), so it "
            f"would stay as it was drawn. Call `callback.attach(model, processor)` before you build the optimizer "
            f"that you pass to the Trainer, and after `get_peft_model`."
        )


def _training_values(hook, sums, args):
    """Returns what is logged of the sums since the last log, and warns of what was left out."""
    values = {}
    if sums["images"]:
        values["feedback_loss"] = sums["loss"] / sums["images"]
    if sums["anchored"]:
        values["anchor_loss"] = sums["anchor"] / sums["anchored"]
    if sums["text"] and sums["feedback"] and sums["steps"]:
        # Per step, and of the gradients' mean over the ranks: that is what the optimizer gets.
        parts = sums["steps"] * args.world_size
        values["text_gradient_norm"] = math.sqrt(sums["text"] / parts)
        values["feedback_gradient_norm"] = math.sqrt(sums["feedback"] / parts)
        values["gradient_cosine"] = sums["product"] / math.sqrt(sums["text"] * sums["feedback"])
    if hook.balance is not None:
        values["feedback_weight"] = hook.balance.weight
    if sums["blank"]:
        values["feedback_blank"] = sums["blank"]
    if sums["nonfinite"]:
        values["feedback_nonfinite"] = sums["nonfinite"]
    if sums["unseen"]:
        logger.warning(
            "In %d calls the model was given pictures that its vision tower (%s) never saw, as videos may go to a "
            "tower of their own. These pictures got no feedback.",
            sums["unseen"],
            type(hook.source.module).__name__,
        )
    hook.tally.add(sums["views"], sums["nonfinite"])
    return values


class Attachment:
    """
    What of a [`Feedback`] is on a model: hooks, the conditioner as its module, and the keys that a save leaves out.
    """

    def __init__(self, model, feedback):
        self.model = model
        self.feedback = feedback
        self.handles = []
        self.ignored = None  # what `_keys_to_ignore_on_save` of the model was
        self.began = False  # a training has begun since

    @property
    def active(self) -> bool:
        """Whether it is on the model."""
        return bool(self.handles)

    def attach(self):
        """Puts all of it on the model; does nothing where it is."""
        if self.active:
            return
        other = getattr(self.model, "feedback_attachment", None)
        if other is not None:
            raise ValueError(
                "This model has the feedback of another DiffusionFeedbackCallback, attached later. Call `detach()` on "
                "that one before this Trainer trains again, or go on with the newer Trainer."
            )
        model, hook, conditioner = self.model, self.feedback.hook, self.feedback.conditioner
        model.add_module(CONDITIONER_NAME, conditioner)
        model.feedback_attachment = self
        # It trains and resumes with the model, yet a saved VLM holds no key that its own class does not know.
        if isinstance(model, PreTrainedModel):
            names = {f"{CONDITIONER_NAME}.{name}" for name in conditioner.state_dict()}
            self.ignored = model._keys_to_ignore_on_save
            model._keys_to_ignore_on_save = set(self.ignored or ()) | names
        self.handles = hook.register(model)

    def detach(self):
        """Takes all of it off the model; does nothing where it is not."""
        for handle in self.handles:
            handle.remove()
        if self.active:
            delattr(self.model, CONDITIONER_NAME)
            del self.model.feedback_attachment
            if isinstance(self.model, PreTrainedModel):
                self.model._keys_to_ignore_on_save = self.ignored
            # The losses of a step that was interrupted hold its graph.
            self.feedback.hook.state = StepState()
        self.handles = []


def step_seed(seed: int, step: int, rank: int) -> int:
    """
    Returns the seed of a step's first noise: a function of the step, so that a resumed run draws what the
    uninterrupted one would have drawn. Room for 1,024 calls in a step.
    """
    return ((seed * 1_000_003 + step) * 4_099 + rank) * 1_024 % 2**63


def _check_run(args):
    """Raises on ways to train that the feedback cannot follow."""
    if args.n_gpu > 1:
        raise ValueError(
            f"The Trainer would run this model by nn.DataParallel on {args.n_gpu} GPUs, whose copies of the tower "
            f"the feedback cannot reach. Launch with `torchrun --nproc_per_node {args.n_gpu}` or `accelerate "
            f"launch`, or show the process one GPU (CUDA_VISIBLE_DEVICES=0)."
        )
    if is_deepspeed_zero3_enabled():
        raise ValueError("The feedback does not support DeepSpeed ZeRO-3. Use ZeRO-2, FSDP or DDP.")
    if args.deepspeed_plugin is not None and args.fp16:
        raise ValueError("The feedback cannot see DeepSpeed's loss scale for fp16. Set `bf16: true`.")


def _of_next_step(args, state, train_dataloader) -> tuple[int, int]:
    """
    Returns how many micro-batches the next optimizer step accumulates and how many conversations a process reads in
    it. The last step of an epoch may have fewer of both; of conversations on a single process only, for accelerate
    fills the batches of several up. A stream has no length, and Trainer cuts its epochs at whole steps.
    """
    micro_batches, size = args.gradient_accumulation_steps, state.train_batch_size or args.train_batch_size
    try:
        batches = len(train_dataloader)
    except TypeError:
        return micro_batches, micro_batches * size
    steps = -(-batches // micro_batches)
    if (state.global_step + 1) % steps:
        return micro_batches, micro_batches * size
    micro_batches = batches % micro_batches or micro_batches
    try:
        empty = batches * size - len(train_dataloader.dataset)
    except (TypeError, AttributeError):  # a loader of another library
        empty = 0
    return micro_batches, micro_batches * size - (empty if args.world_size == 1 and 0 < empty < size else 0)
