"""Diffusion feedback for the Trainer you already have: one callback."""

import logging
import os

from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from ..vision.hosts import find_tower
from .anchor import Anchor
from .checkpoint import FILE_NAME, load_conditioner, save_conditioner
from .config import FeedbackConfig
from .denoisers import check_context_dim
from .diffusion_model import load_autoencoder
from .economy import economise
from .factory import load_judge, make_conditioner, make_objective, make_token_denoiser
from .hook import FeedbackHook
from .language_hook import LanguageHook
from .latent_cache import LatentCache, fingerprint
from .offload import pin
from .token_denoiser import TokenBlocks
from .views import TokenReading

logger = logging.getLogger(__name__)

# The attribute of the model that holds the conditioner while it trains.
CONDITIONER_NAME = "feedback_conditioner"


class DiffusionFeedbackCallback(TrainerCallback):
    """
    Trains the vision tower of any VLM with diffusion feedback (DEEM, https://arxiv.org/abs/2405.15232).

    Works with `transformers.Trainer`, its subclasses and TRL's `SFTTrainer`; the model, the data set and the loss stay
    as they are. `trainer.log` shows the language-model loss as before and `feedback_loss` beside it.

    The feedback is `weight` times the mean over a micro-batch's images, each micro-batch of an accumulation counting
    alike, as in the paper. Batches with text only cost nothing.

    Args:
        config (`FeedbackConfig`): The settings.
        generator (`DiffusionModel`, *optional*): The frozen generator; loaded from `config.denoiser` by default.
        feedback (`Callable`, *optional*):
            `(latents, context, *, generator) -> (images,)` with an attribute `context_dim`; by default what the
            `objective` of the config names, on the generator's denoiser.

    Example:

        trainer = Trainer(
            model=vlm,
            processing_class=processor,
            callbacks=[DiffusionFeedbackCallback(FeedbackConfig(denoiser="path/or/id", weight=5.0))],
            ...
        )
    """

    def __init__(self, config: FeedbackConfig, generator=None, feedback=None):
        if generator is None and config.denoiser is None:
            raise ValueError(
                "The feedback needs a generator: set `denoiser` to a folder or hub id in diffusers' layout, for "
                "example `FeedbackConfig(denoiser='path/to/stable-diffusion')`."
            )
        self.config = config
        self.generator = generator
        self.feedback = feedback
        self.hook = None
        self.model = None
        self._resume_from = None

    @property
    def conditioner(self):
        """The trained conditioner; None before [`attach`]."""
        return None if self.model is None else getattr(self.model, CONDITIONER_NAME)

    def attach(self, model, processing_class=None):
        """
        Puts the conditioner into `model` and the hook on its vision tower. Called when the Trainer is made; call it
        yourself, before the optimizer exists, if you add the callback later or build the optimizer first.

        Args:
            model (`nn.Module`): The VLM, or the PEFT model around it.
            processing_class (`ProcessorMixin`, *optional*): Tells the normalisation of `pixel_values`.

        Raises:
            ValueError: If there is no vision tower, it is frozen, or the normalisation is unknown.
        """
        if self.hook is not None:
            return
        base = _without_peft(model)
        if self.config.source == "llm":
            self._attach_to_decoder(base, processing_class)
            return
        tower = find_tower(base)
        if self.config.conditioner_only:
            tower.requires_grad_(False)
        elif not any(parameter.requires_grad for parameter in tower.parameters()):
            raise ValueError(
                f"The vision tower ({type(tower).__name__}) is frozen: all its parameters have requires_grad=False, "
                f"so that there is nothing to feed back to. Unfreeze it (`tower.requires_grad_(True)`, or no `freeze` "
                f"pattern on it in the recipe), put LoRA on it, or leave the feedback out. To train the conditioner "
                f"alone, set `conditioner_only`."
            )
        mean, std = normalization(self.config, processing_class)
        if self.generator is None:
            self.generator = load_judge(self.config)
        if self.config.latent_cache is not None:
            self.generator.latent_cache = LatentCache(self.config.latent_cache, fingerprint(self.generator))
        if self.feedback is None:
            self.feedback = make_objective(self.config, self.generator.denoiser)
        economise(self.generator, self.config)

        reading = TokenReading.of(base.config)
        self.model = base
        self._put_into(base, make_conditioner(self.config, tower, reading, self.feedback))
        self.hook = FeedbackHook(
            lambda: self.conditioner,
            self.feedback,
            self.generator,
            reading,
            mean,
            std,
            self.config,
            Anchor(tower) if self.config.anchor_weight else None,
        )
        if self.config.cpu_offload and not self.hook.judge_is_frozen:
            raise ValueError(
                f"`cpu_offload` needs a feedback whose `denoiser` is frozen, so that its gradient can be taken before "
                f"the weights leave, and a {type(self.feedback).__name__} has none. Leave `cpu_offload` out."
            )
        self._register(tower)

    def _attach_to_decoder(self, base, processing_class):
        """Attaches to the language model; the conditioner is then a denoiser itself."""
        config = self.config
        mean, std = normalization(config, processing_class)
        if self.generator is None:
            self.generator = load_autoencoder(config.denoiser)
        decoder = base.get_decoder()
        width = base.config.get_text_config().hidden_size
        grid = None if config.token_grid is None else tuple(config.token_grid)
        blocks = TokenBlocks(lambda: self.conditioner, width, config.token_cells, grid)
        if self.feedback is None:
            self.feedback = make_objective(config, blocks)
        self.model = base
        self._put_into(base, make_token_denoiser(config, decoder, width, self.generator.codec.channels))
        token_id = getattr(base.config, "image_token_id", None)
        if token_id is None:
            token_id = base.config.image_token_index
        self.hook = LanguageHook(
            lambda: self.conditioner,
            self.feedback,
            self.generator,
            TokenReading(),
            mean,
            std,
            config,
            image_token_id=token_id,
        )
        base.register_forward_pre_hook(lambda module, args, kwargs: self.hook.note(kwargs), with_kwargs=True)
        self._register(decoder)

    def _register(self, module):
        """Puts the hook on the module whose output it reads, and the conditioner in its first state."""
        base = self.model
        if self.config.conditioner is not None:
            self.start_from(self.config.conditioner)
        # First among the hooks, so that it runs before FSDP reshards the tower.
        module.register_forward_hook(self.hook, prepend=True, with_kwargs=True)
        base.register_forward_pre_hook(self._take_targets, with_kwargs=True)

    def _put_into(self, base, conditioner):
        """Makes the conditioner a module of the model."""
        base.add_module(CONDITIONER_NAME, conditioner)
        # It trains and resumes with the model, yet a saved VLM holds no key that its own class does not know.
        if isinstance(base, PreTrainedModel):
            names = {f"{CONDITIONER_NAME}.{name}" for name in conditioner.state_dict()}
            base._keys_to_ignore_on_save = set(base._keys_to_ignore_on_save or ()) | names

    def _take_targets(self, module, args, kwargs):
        """Takes `target_pixel_values` out of the batch before the model, which does not know them, sees it."""
        if "target_pixel_values" in kwargs:
            self.hook.target_pixel_values = kwargs.pop("target_pixel_values")
        return args, kwargs

    def load(self, folder):
        """
        Loads the conditioner of a run to resume from the `feedback.safetensors` in `folder`.

        A resumed run does so by itself for the checkpoints of its own `output_dir`; call it before `trainer.train`
        when you resume from elsewhere.
        """
        self.start_from(folder)
        self._resume_from = folder

    def start_from(self, folder):
        """
        Starts a new run with the conditioner that an earlier one left in `folder`, such as its first stage.

        Raises:
            FileNotFoundError: If `folder` holds no `feedback.safetensors`.
            ValueError: If it was made with other settings than this run's.
        """
        loaded, _ = load_conditioner(folder)
        if loaded.arguments != self.conditioner.arguments:
            raise ValueError(
                f"The conditioner in {folder} was made with {loaded.arguments}, this run's with "
                f"{self.conditioner.arguments}. Use the settings of the first run; or, to start with a new "
                f"conditioner, move the file {FILE_NAME} out of that folder."
            )
        self.conditioner.load_state_dict(loaded.state_dict())

    def on_init_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        """Attaches to the Trainer's model."""
        self.attach(model, processing_class)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Checks that the feedback can work, and restores the conditioner of a resumed run."""
        if self.hook is None:
            raise RuntimeError(
                "The DiffusionFeedbackCallback was added after the Trainer was made, so it is attached to nothing. "
                "Pass it as `callbacks=[...]`, or call `callback.attach(model, processor)` before `Trainer(...)`."
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"The Trainer would run this model by nn.DataParallel on {args.n_gpu} GPUs, whose copies of the tower "
                f"the feedback cannot reach. Launch with `torchrun --nproc_per_node {args.n_gpu}` or `accelerate "
                f"launch`, or show the process one GPU (CUDA_VISIBLE_DEVICES=0)."
            )
        if is_deepspeed_zero3_enabled():
            raise ValueError("The feedback does not support DeepSpeed ZeRO-3. Use ZeRO-2, FSDP or DDP.")
        if args.deepspeed and args.fp16:
            raise ValueError("The feedback cannot see DeepSpeed's loss scale for fp16. Set `bf16: true`.")
        if self.config.source == "tower":
            check_context_dim(self.conditioner.arguments["context_dim"], self.feedback)
        if not args.deepspeed and not args.fsdp:
            self._check_optimizer(optimizer)
        self.generator.to(args.device)
        if self.config.cpu_offload and args.device.type == "cuda":
            pin(self.generator.modules())
        if self.hook.anchor is not None:
            self.hook.anchor.to(args.device)
        if state.global_step > 0 and self._resume_from is None:
            folder = args.resume_from_checkpoint
            if not isinstance(folder, str | os.PathLike):
                folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
            try:
                self.load(folder)
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"The run resumes at step {state.global_step}, but {folder} holds no conditioner. Call "
                    f"`callback.load(folder)` with the checkpoint's folder before `trainer.train(...)`."
                ) from error

    def _check_optimizer(self, optimizer):
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [name for name, value in self.conditioner.named_parameters() if id(value) not in trained]
        if missing:
            raise ValueError(
                f"The conditioner is in no optimizer group ({len(missing)} parameters, first {missing[0]!r}), so it "
                f"would stay as it was drawn. Call `callback.attach(model, processor)` before you build the optimizer "
                f"that you pass to the Trainer."
            )

    def on_step_begin(self, args, state, control, optimizer=None, train_dataloader=None, **kwargs):
        """Sets the factor on the feedback's gradient and the seed of its noise for the next optimizer step."""
        accumulation = _micro_batches(args, state, train_dataloader)
        scaler = getattr(optimizer, "scaler", None)
        # Under fp16 the gradients of the loss are scaled; those of the feedback must be scaled alike.
        loss_scale = scaler.get_scale() if scaler is not None else 1.0
        self.hook.scale = self.config.weight_at(state.global_step) / accumulation * loss_scale
        # A function of the step, so that a resumed run draws what the uninterrupted one would have drawn.
        seed = ((self.config.seed * 1_000_003 + state.global_step) * 4_099 + args.process_index) * 1_024
        self.hook.seed = seed % 2**63

    def on_step_end(self, args, state, control, **kwargs):
        """Checks that the feedback of this step reached the tower."""
        self.hook.check_injected()

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        """Adds `feedback_loss` (mean over steps and ranks since the last log) to what is logged."""
        values = {}
        if "loss" in logs and (value := self.hook.train_loss.take(args.device)) is not None:
            values["feedback_loss"] = value
        if "loss" in logs and (value := self.hook.anchor_loss.take(args.device)) is not None:
            values["anchor_loss"] = value
        if self.config.in_eval and "eval_loss" in logs:
            if (value := self.hook.eval_loss.take(args.device)) is not None:
                values["eval_feedback_loss"] = value
        if not values:
            return
        logs.update(values)
        state.log_history[-1].update(values)
        from .reporting import report

        report(values, args, state, control, model)

    def on_save(self, args, state, control, **kwargs):
        """Writes the conditioner beside the checkpoint that was just saved."""
        folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        save_conditioner(self.conditioner, self.config, folder, write=args.should_save)

    def on_train_end(self, args, state, control, **kwargs):
        """Writes the conditioner to the output folder, where `trainer.save_model()` puts the model."""
        save_conditioner(self.conditioner, self.config, args.output_dir, write=args.should_save)
        self.hook.scale = 0.0


def normalization(config, processing_class):
    """
    Returns mean and std that `pixel_values` were normalised with.

    Args:
        config (`FeedbackConfig`): Its `image_mean` and `image_std` win where they are set.
        processing_class (`ProcessorMixin` or `BaseImageProcessor`): Tells its own otherwise.

    Raises:
        ValueError: If neither knows.
    """
    if config.image_mean is not None:
        return config.image_mean, config.image_std
    image_processor = getattr(processing_class, "image_processor", processing_class)
    mean, std = getattr(image_processor, "image_mean", None), getattr(image_processor, "image_std", None)
    if mean is None or std is None:
        raise ValueError(
            f"The picture that the generator must restore is made of `pixel_values`, whose normalisation is not "
            f"known: processing_class={type(processing_class).__name__} has no image_mean and image_std. Give "
            f"the Trainer the VLM's processor (`processing_class=processor`), or set `image_mean` and `image_std` "
            f"of the FeedbackConfig."
        )
    if image_processor.do_normalize is False:
        return [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
    return mean, std


def _without_peft(model):
    """Returns the transformers model inside a PEFT model, or the model itself."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def _micro_batches(args, state, train_dataloader) -> int:
    """Returns how many micro-batches the next optimizer step accumulates; the last one of an epoch may have fewer."""
    accumulation = args.gradient_accumulation_steps
    try:
        batches = len(train_dataloader)
    except TypeError:  # a streamed data set has no length, and Trainer cuts its epochs at whole steps
        return accumulation
    steps = -(-batches // accumulation)
    is_last = (state.global_step + 1) % steps == 0
    return (batches % accumulation or accumulation) if is_last else accumulation
