"""DeemForConditionalGeneration: one causal model over interleaved text and pictures, with the paper's three losses."""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..feedback.loss import ImageLosses
from ..feedback.synchroniser import UNetSynchroniserBlock
from ..vision.deformable import DeformableAttention
from ..vision.grids import positioned_maps
from ..vision.tower import DeemVisionOutput, DeemVisionTower
from .configuration import DeemConfig
from .denoising import DenoisingBatch, DenoisingHeads, restorable_pictures, totals_of
from .image_decoder import ImageDecoder
from .interleaving import (
    IGNORE_INDEX,
    by_rows,
    fill_image_slots,
    positions_behind_padding,
    positions_in_documents,
    row_starts,
    visible_images,
)
from .language_synchroniser import GatedImageAttention, LanguageModelSynchroniser
from .losses import Draws, next_token_loss

# A new token's logit starts this much below the others, so that an untrained one is hardly ever said (official code).
NEW_TOKEN_BIAS = -5.0
# The two heads of the tower's queries start near zero (official code).
HEAD_STD = 1e-3
# Maps that a language model looks at by default: strides 8, 16 and 32 of a ConvNeXt.
LANGUAGE_LEVELS = 3
# What of its inputs has a row for each picture.
IMAGE_INPUTS = ("pixel_values", "region_masks")


@contextmanager
def _last_hidden_states(language_model):
    """Collects the last hidden state of each call; asked for by `output_hidden_states`, all layers' would be kept."""
    states = []
    hook = language_model.base_model.register_forward_hook(lambda module, args, output: states.append(output[0]))
    try:
        yield states
    finally:
        hook.remove()


@dataclass
class DeemOutput(CausalLMOutputWithPast):
    """
    Output of [`DeemForConditionalGeneration`].

    Args:
        loss (`torch.Tensor`, *optional*):
            The weighted sum of the losses of the next token (NTP), the next image (NIP) and the same image (CSR).
        lm_loss, image_loss (`torch.Tensor`, *optional*): The first two; `None` where a loss was not computed.
        feedback_loss (`torch.Tensor`, *optional*):
            The third as its mean per image of this call, detached. In `loss` it is the sum over the images by the
            documents of the optimizer step.
        feedback (`ImageLosses`, *optional*): The same image by image, and how many of them count.
        logits (`torch.Tensor`): Shape `(batch, tokens, vocabulary)`, the new tokens last.
        cache (`Cache`, *optional*): For the next call.
        last_hidden_state (`torch.Tensor`): Of the language model, shape `(batch, tokens, hidden_size)`.
        image_tokens (`torch.Tensor`, *optional*): What the tower saw, `(images, queries, tower width)`.
        maps (`dict[str, torch.Tensor]`, *optional*): Its multi-scale maps.
        image_maps (`tuple`, *optional*): The maps as the language model looks at them, for the next step.
    """

    lm_loss: torch.Tensor | None = None
    image_loss: torch.Tensor | None = None
    feedback_loss: torch.Tensor | None = None
    feedback: ImageLosses | None = None
    last_hidden_state: torch.Tensor | None = None
    image_tokens: torch.Tensor | None = None
    maps: dict[str, torch.Tensor] | None = None
    image_maps: tuple | None = None


class DeemForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """
    The model of DEEM (https://arxiv.org/abs/2405.15232, Sec. 2): a tower, a causal language model, and two heads that
    speak to one frozen diffusion model, which is attached for training and drawing and is no part of the model.

    - next token (NTP): the language model reads the tower's queries in the slots of each picture;
    - next image (NIP): an [`ImageDecoder`] makes the denoiser's context of what stands before a picture;
    - same image (CSR): a linear head makes it of the tower's queries, the diffusion feedback.

    Args:
        config (`DeemConfig`): What to build. The weights are new; [`assemble_deem`] takes pretrained parts.
    """

    config_class = DeemConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # divides by the Trainer's count of items in the whole step
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["cache"]

    def __init__(self, config: DeemConfig, language_model=None, vision_tower=None):
        super().__init__(config)
        width = config.text_config.hidden_size
        self.vision_tower = vision_tower or DeemVisionTower(config.vision_config)
        self.connector = nn.Linear(config.vision_config.hidden_size, width)
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        self.new_embeddings = nn.Embedding(config.num_new_tokens, width)
        self.new_head = nn.Linear(width, config.num_new_tokens)
        self.denoising = None if config.context_dim is None else DenoisingHeads(config)
        self.language_synchroniser = None
        if config.language_synchroniser is not None:
            self.language_synchroniser = LanguageModelSynchroniser(
                width,
                config.text_config.num_hidden_layers,
                config.vision_config.encoder_dim,
                norm_eps=getattr(config.text_config, "rms_norm_eps", 1e-6),
                **config.language_synchroniser,
            )
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, ImageDecoder):
            init.normal_(module.null_context, std=self.config.initializer_range)
        elif module is self.connector or module is getattr(self.denoising, "feedback_head", None):
            init.normal_(module.weight, std=HEAD_STD)
        elif module is self.new_head:
            init.zeros_(module.weight)
            init.constant_(module.bias, NEW_TOKEN_BIAS)
        elif isinstance(module, (DeformableAttention, GatedImageAttention, UNetSynchroniserBlock)):
            module.reset_parameters()

    def attach_diffusion_model(self, diffusion_model):
        """
        Gives the model the frozen diffusion model that its losses and its drawing need.

        The diffusion model is no module of the model: no state dict, optimizer, DDP bucket or FSDP shard ever sees it.

        Args:
            diffusion_model (`DiffusionModel`): From [`load_diffusion_model`].

        Raises:
            ValueError: If the model only reads, or its heads do not fit the denoiser's context.
        """
        if self.denoising is None:
            raise ValueError(
                "This model only reads (`context_dim` is None), so a diffusion model has nothing to listen to."
            )
        self.denoising.attach(diffusion_model)

    @property
    def diffusion_model(self):
        """The `DiffusionModel` that was attached, or None."""
        return None if self.denoising is None else self.denoising.diffusion_model

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, **options):
        """As everywhere in transformers; layers that look at maps find them again when they are recomputed."""
        kwargs = dict(activation_checkpointing_kwargs or {})
        if self.language_synchroniser is not None:
            if kwargs.get("use_reentrant"):
                raise ValueError(
                    "The language model looks at maps, which reentrant checkpointing cannot bring back. Set "
                    "`activation_checkpointing_kwargs={'use_reentrant': False}`."
                )
            kwargs |= {"use_reentrant": False, "context_fn": self.language_synchroniser.checkpoint_contexts}
        super().activation_checkpointing_enable(kwargs or None, **options)

    def get_input_embeddings(self):
        """Returns the embedding of the language model's own tokens."""
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self):
        """Returns the language model's own head."""
        return self.language_model.get_output_embeddings()

    def resize_token_embeddings(self, *args, **kwargs):
        """Refuses: new tokens have rows of their own, the first ids behind the language model's."""
        raise ValueError(
            "A DEEM has rows of its own for new tokens and cannot be resized. Name them when the model is made: "
            "`assemble_deem(..., extra_tokens=[...])`."
        )

    def embed(self, input_ids):
        """Embeds token ids `(batch, tokens)`, those of the new tokens from rows of our own."""
        new = input_ids >= self.config.first_new_token_id
        known = self.get_input_embeddings()(input_ids.masked_fill(new, 0))
        added = self.new_embeddings((input_ids - self.config.first_new_token_id).clamp(min=0))
        return torch.where(new[..., None], added.to(known.dtype), known)

    def get_image_features(self, pixel_values, region_masks=None, **kwargs) -> DeemVisionOutput:
        """
        Reads pictures.

        Args:
            pixel_values (`torch.Tensor`): Shape `(images, 3, size, size)`, normalised.
            region_masks (`torch.Tensor`, *optional*): Shape `(images, 1, height, width)`, nonzero in the region meant.

        Returns:
            `DeemVisionOutput`: `last_hidden_state`, the tower's queries `(images, queries, tower width)`;
            `pooler_output`, what the language model reads of them `(images, queries, hidden_size)`; and `maps`.
        """
        output = self.vision_tower(pixel_values.to(self.vision_tower.dtype), region_masks=region_masks)
        output.pooler_output = self.connector(output.last_hidden_state)
        return output

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        region_masks: torch.Tensor | None = None,
        target_pixel_values: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        image_loss_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        step_totals: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        draws: dict[str, Draws] | None = None,
        image_maps: tuple[list[torch.Tensor], torch.Tensor] | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> DeemOutput:
        """
        Args:
            input_ids (`torch.Tensor`): Shape `(batch, tokens)`. Before its slots a picture has an image start.
            attention_mask (`torch.Tensor`, *optional*): Zero at padding, `(batch, tokens)`.
            position_ids, inputs_embeds, use_cache, logits_to_keep: As for any causal language model.
            pixel_values (`torch.Tensor`, *optional*): The pictures in reading order, `(images, 3, size, size)`.
            region_masks (`torch.Tensor`, *optional*):
                Shape `(images, 1, height, width)`, nonzero where a picture is meant. Patches outside are not seen, and
                the feedback is the mean error inside.
            target_pixel_values (`torch.Tensor`, *optional*):
                The pictures to be restored, `(images, 3, height, width)` in [-1, 1]; made of `pixel_values` by
                default.
            document_ids (`torch.Tensor`, *optional*):
                Number of the packed document that each token belongs to, -1 at padding, `(batch, tokens)`. Documents
                do not see each other. Without it each row is one document.
            image_loss_mask (`torch.Tensor`, *optional*): Zero where the next image is not to be learned, `(images,)`.
            labels (`torch.Tensor`, *optional*): Token ids and -100, `(batch, tokens)`.
            num_items_in_batch (`int`, *optional*):
                Learned tokens of the whole optimizer step, as the Trainer counts them; its micro-batches and ranks
                then add up to the mean over all tokens.
            step_totals (`torch.Tensor`, *optional*):
                The same for the two denoising losses, as `totals_of` counts, `(2,)`. Given by the Trainer of our
                recipes. With the stock one they are those of a micro-batch, weighted by its share of tokens.
            generator (`torch.Generator`, *optional*): Source of what is drawn.
            draws (`dict[str, Draws]`, *optional*): Under `"feedback"` and `"image"`, instead of drawing.
            image_maps (`tuple`, *optional*): What an earlier step of `generate` returned under this name.
            cache (`Cache`, *optional*): Of an earlier call; `input_ids` are then what comes behind.
            kwargs: The language model's own.

        Returns:
            `DeemOutput`: With losses where there are labels. The two denoising losses are computed in training alone,
            or with `draws`.

        Raises:
            ValueError: If pictures and slots do not match, or a loss asks for a diffusion model that is not attached.
        """
        features = starts = None
        counted = {"input_ids": input_ids, "attention_mask": attention_mask, "document_ids": document_ids}
        if inputs_embeds is None:
            starts = row_starts(**counted)
            inputs_embeds = self.embed(input_ids)
            if pixel_values is not None:
                features = self.get_image_features(pixel_values, region_masks)
                inputs_embeds = fill_image_slots(
                    inputs_embeds, input_ids, self.config.image_token_id, features.pooler_output
                )
            image_maps = self._maps_for_text(features, input_ids, starts, image_maps)
        if document_ids is not None:
            # Positions that start anew, without mask and cache, tell transformers' attention of packed documents.
            position_ids, attention_mask, use_cache = positions_in_documents(document_ids), None, False
        elif position_ids is None and isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            # Language models with absolute positions would count padding on the left.
            position_ids = positions_behind_padding(attention_mask)[:, -inputs_embeds.shape[1] :]
        kwargs |= {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "position_ids": position_ids}
        result = self._language(image_maps, logits_to_keep, cache=cache, use_cache=use_cache, **kwargs)
        if features is not None:
            result.image_tokens, result.maps = features.last_hidden_state, features.maps
        if labels is None:
            return result
        result.lm_loss = next_token_loss(result.logits, labels, num_items_in_batch)
        result.loss = self.config.lm_weight * result.lm_loss
        if features is not None and (self.training or draws):
            share, totals = 1.0, step_totals
            if totals is None:
                totals = self.totals_of(counted | {"image_loss_mask": image_loss_mask})
                if num_items_in_batch is not None:
                    share = (labels[:, 1:] != IGNORE_INDEX).sum() / num_items_in_batch
            batch = DenoisingBatch(
                input_ids=input_ids,
                starts=starts,
                hidden_states=result.last_hidden_state,
                image_tokens=result.image_tokens,
                maps=result.maps,
                pictures=restorable_pictures(self.config, pixel_values, target_pixel_values),
                totals=totals,
                region_masks=region_masks,
                image_loss_mask=image_loss_mask,
            )
            self._add_denoising_losses(result, batch, draws, generator, share)
        return result

    def _language(self, image_maps, logits_to_keep, **kwargs) -> DeemOutput:
        """Runs the language model, which looks at `image_maps` where there are any, and the head of the new tokens."""
        attached = nullcontext()
        if image_maps is not None:
            attached = self.language_synchroniser.attached(self.language_model, *image_maps)
        with attached, _last_hidden_states(self.language_model) as states:
            outputs = self.language_model(logits_to_keep=logits_to_keep, **kwargs)
        [hidden] = states
        kept = hidden[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else hidden[:, logits_to_keep]
        return DeemOutput(
            logits=torch.cat([outputs.logits[..., : self.config.first_new_token_id], self.new_head(kept)], dim=-1),
            last_hidden_state=hidden,
            image_maps=image_maps,
            cache=outputs.cache,
        )

    def totals_of(self, inputs) -> torch.Tensor:
        """Counts documents and images of a batch for `step_totals`, `(2,)`."""
        return totals_of(self.config, inputs)

    def _add_denoising_losses(self, result, batch, draws, generator, share):
        """Adds the two losses of the diffusion model to a result, those of weight 0 left out."""
        config = self.config
        if not (config.feedback_weight or config.image_weight):
            return
        if self.diffusion_model is None:
            raise ValueError(
                "Training with `feedback_weight` or `image_weight` above 0 needs the frozen diffusion model: call "
                "`model.attach_diffusion_model(load_diffusion_model(PATH))`, or set both weights of the config to 0."
            )
        same, next_image = self.denoising(batch, draws, generator)
        if same is not None:
            result.feedback, result.feedback_loss = same, same.mean
            result.loss = result.loss + config.feedback_weight * share * same.total / batch.totals[0]
        if next_image is not None:
            result.image_loss = share * next_image
            result.loss = result.loss + config.image_weight * result.image_loss

    def _maps_for_text(self, features, input_ids, starts, before):
        """
        Returns the maps that the language model looks at, arranged by rows, and which token sees which, or `None`;
        those of an earlier call (`before`) come first and are seen by all that its last token was.
        """
        seen = None if before is None else before[1][:, -1:]
        if features is None or self.language_synchroniser is None:
            return None if before is None else (before[0], seen)
        count = self.config.language_synchroniser.get("num_levels", LANGUAGE_LEVELS)
        # The finest maps cost most and tell a language model least.
        levels = by_rows(positioned_maps(features.maps)[-count:], self._pictures_by_row(input_ids))
        visible = visible_images(input_ids, starts, self.config.image_start_token_id, self.config.image_token_id)
        if before is not None:
            # The start of a picture that the row begins with was the last token of the earlier call.
            own = visible.new_ones(*visible.shape[:2], levels[0].shape[1] - visible.shape[2])
            visible = torch.cat([seen.expand(-1, input_ids.shape[1], -1), own, visible], dim=2)
            levels = [torch.cat(pair, dim=1) for pair in zip(before[0], levels, strict=True)]
        return levels, visible

    def _pictures_by_row(self, input_ids) -> list[int]:
        """Counts the pictures that each row shows; one that is yet to be drawn has a start, but no slots."""
        slots = (input_ids == self.config.image_token_id).sum(1)
        return (slots // self.config.vision_config.num_image_tokens).tolist()

    def prepare_inputs_for_generation(
        self, input_ids, pixel_values=None, region_masks=None, is_first_iteration=False, **kwargs
    ):
        """Hands the pictures to the first step only; the cache holds what was read of them."""
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs |= {"pixel_values": pixel_values, "region_masks": region_masks}
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        """Repeats the pictures of a row together, so that those of several rows do not mix under beam search."""
        of_images = {name: kwargs.pop(name, None) for name in IMAGE_INPUTS}
        counts = self._pictures_by_row(input_ids)
        for name, value in of_images.items():
            if value is not None and expand_size > 1:
                value = torch.cat([own.repeat(expand_size, 1, 1, 1) for own in torch.split(value, counts)])
            of_images[name] = value
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, kwargs | of_images

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        """Keeps the maps of the prompt's pictures for the steps that follow; without a cache these read them anew."""
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if outputs.image_maps is not None and model_kwargs.get("use_cache", True):
            model_kwargs["image_maps"] = outputs.image_maps
        return model_kwargs
