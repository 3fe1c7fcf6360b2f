"""DeemForConditionalGeneration: one causal model over interleaved text and pictures, with the paper's three losses."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput

from ..feedback.denoisers import check_context_dim
from ..feedback.diffusion_feedback import DiffusionFeedback
from ..feedback.objectives import unnormalize
from ..feedback.timesteps import TIMESTEP_SAMPLERS
from ..vision.tower import DeemVisionTower, region_to_patches
from .configuration import DeemConfig
from .image_decoder import ImageDecoder
from .interleaving import fill_image_slots, image_places, positions_in_documents, reversed_contexts, row_starts
from .losses import Draws, mean_over_valid, next_token_loss

# A new token's logit starts this much below the others, so that an untrained one is hardly ever said (official code).
NEW_TOKEN_BIAS = -5.0
# The two heads of the tower's queries start near zero (official code).
HEAD_STD = 1e-3


@dataclass
class DeemOutput(ModelOutput):
    """
    Output of [`DeemForConditionalGeneration`].

    Args:
        loss (`torch.Tensor`, *optional*): The weighted sum of the losses below.
        lm_loss, image_loss, feedback_loss (`torch.Tensor`, *optional*):
            Next token (NTP), next image (NIP), same image (CSR); `None` where a loss was not computed.
        logits (`torch.Tensor`): Shape `(batch, tokens, vocabulary)`, the new tokens last.
        past_key_values (`Cache`, *optional*): For the next step of `generate`.
        last_hidden_state (`torch.Tensor`): Of the language model, shape `(batch, tokens, hidden_size)`.
        image_tokens (`torch.Tensor`, *optional*): What the tower saw, `(images, queries, tower width)`.
    """

    loss: torch.Tensor | None = None
    lm_loss: torch.Tensor | None = None
    image_loss: torch.Tensor | None = None
    feedback_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: object | None = None
    last_hidden_state: torch.Tensor | None = None
    image_tokens: torch.Tensor | None = None


class DeemForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """
    The model of DEEM (https://arxiv.org/abs/2405.15232, Sec. 2): a tower, a causal language model, and two heads that
    speak to one frozen generator, which is attached for training and drawing and is no part of the model.

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
    _skip_keys_device_placement = ["past_key_values"]

    def __init__(self, config: DeemConfig, language_model=None, vision_tower=None):
        super().__init__(config)
        width = config.text_config.hidden_size
        self.vision_tower = vision_tower or DeemVisionTower(config.vision_config)
        self.connector = nn.Linear(config.vision_config.hidden_size, width)
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        self.new_embeddings = nn.Embedding(config.num_new_tokens, width)
        self.new_head = nn.Linear(width, config.num_new_tokens)
        self.feedback_head = self.image_decoder = None
        if config.context_dim is not None:
            self.feedback_head = nn.Linear(config.vision_config.hidden_size, config.context_dim)
            self.image_decoder = ImageDecoder(
                width,
                config.context_dim,
                num_queries=config.vision_config.num_image_tokens,
                num_layers=config.image_decoder_layers,
                num_heads=config.image_decoder_heads,
                intermediate_dim=config.image_decoder_intermediate_size,
            )
        self.generator = None
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, ImageDecoder):
            init.normal_(module.null_context, std=self.config.initializer_range)
        elif module is self.connector or module is self.feedback_head:
            init.normal_(module.weight, std=HEAD_STD)
        elif module is self.new_head:
            init.zeros_(module.weight)
            init.constant_(module.bias, NEW_TOKEN_BIAS)

    def attach_generator(self, generator):
        """
        Gives the model the frozen generator that its losses and its drawing need.

        The generator is no module of the model: no state dict, optimizer, DDP bucket or FSDP shard ever sees it.

        Args:
            generator (`Generator`): From [`load_generator`].

        Raises:
            ValueError: If the model only reads, or its heads do not fit the denoiser's context.
        """
        if self.config.context_dim is None:
            raise ValueError("This model only reads (`context_dim` is None), so a generator has nothing to listen to.")
        check_context_dim(self.config.context_dim, generator.denoiser)
        self.generator = generator

    def get_input_embeddings(self):
        """Returns the embedding of the language model's own tokens."""
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self):
        """Returns the language model's own head."""
        return self.language_model.get_output_embeddings()

    def embed(self, input_ids):
        """Embeds token ids `(batch, tokens)`, those of the new tokens from rows of our own."""
        new = input_ids >= self.config.first_new_token_id
        known = self.get_input_embeddings()(input_ids.masked_fill(new, 0))
        added = self.new_embeddings((input_ids - self.config.first_new_token_id).clamp(min=0))
        return torch.where(new[..., None], added.to(known.dtype), known)

    def get_image_features(self, pixel_values, region_masks=None, **kwargs) -> BaseModelOutputWithPooling:
        """
        Reads pictures.

        Args:
            pixel_values (`torch.Tensor`): Shape `(images, 3, size, size)`, normalised.
            region_masks (`torch.Tensor`, *optional*): Shape `(images, 1, height, width)`, nonzero in the region meant.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state`, the tower's queries `(images, queries, tower width)`,
            and `pooler_output`, what the language model reads of them `(images, queries, hidden_size)`.
        """
        output = self.vision_tower(pixel_values.to(self.vision_tower.dtype), region_masks=region_masks)
        return BaseModelOutputWithPooling(
            last_hidden_state=output.last_hidden_state, pooler_output=self.connector(output.last_hidden_state)
        )

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        region_masks: torch.Tensor | None = None,
        target_pixel_values: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        image_loss_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        draws: dict[str, Draws] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> DeemOutput:
        """
        Args:
            input_ids (`torch.Tensor`): Shape `(batch, tokens)`. Before its slots a picture has an image start.
            attention_mask (`torch.Tensor`, *optional*): Zero at padding, `(batch, tokens)`.
            position_ids, past_key_values, inputs_embeds, use_cache, logits_to_keep: As for any causal language model.
            pixel_values (`torch.Tensor`, *optional*): The pictures in reading order, `(images, 3, size, size)`.
            region_masks (`torch.Tensor`, *optional*):
                Shape `(images, 1, height, width)`, nonzero where a picture is meant. Patches outside are not seen, and
                the feedback is the mean error inside.
            target_pixel_values (`torch.Tensor`, *optional*):
                The pictures for the generator, `(images, 3, height, width)` in [-1, 1]; made of `pixel_values` by
                default.
            document_ids (`torch.Tensor`, *optional*):
                Number of the packed document that each token belongs to, -1 at padding, `(batch, tokens)`. Documents
                do not see each other. Without it each row is one document.
            image_loss_mask (`torch.Tensor`, *optional*): Zero where the next image is not to be learned, `(images,)`.
            labels (`torch.Tensor`, *optional*): Token ids and -100, `(batch, tokens)`, see `make_labels`.
            num_items_in_batch (`int`, *optional*): Given by the Trainer; see `next_token_loss`.
            generator (`torch.Generator`, *optional*): Source of what is drawn.
            draws (`dict[str, Draws]`, *optional*): Under `"feedback"` and `"image"`, instead of drawing.

        Returns:
            `DeemOutput`: With losses where there are labels. The two denoising losses are computed in training alone,
            or with `draws`.

        Raises:
            ValueError: If pictures and slots do not match, or a loss asks for a generator that is not attached.
        """
        image_tokens = None
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids)
            if pixel_values is not None:
                features = self.get_image_features(pixel_values, region_masks)
                image_tokens = features.last_hidden_state
                inputs_embeds = fill_image_slots(
                    inputs_embeds, input_ids, self.config.image_token_id, features.pooler_output
                )
        if document_ids is not None:
            # Positions that start anew, without mask and cache, tell transformers' attention of packed documents.
            position_ids, attention_mask, use_cache = positions_in_documents(document_ids), None, False

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            output_hidden_states=True,
            **kwargs,
        )
        hidden = outputs.hidden_states[-1]
        kept = hidden[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else hidden[:, logits_to_keep]
        logits = torch.cat([outputs.logits[..., : self.config.first_new_token_id], self.new_head(kept)], dim=-1)
        result = DeemOutput(
            logits=logits,
            past_key_values=outputs.past_key_values,
            last_hidden_state=hidden,
            image_tokens=image_tokens,
        )
        if labels is None:
            return result

        result.lm_loss = next_token_loss(logits, labels, num_items_in_batch)
        result.loss = self.config.lm_weight * result.lm_loss
        if image_tokens is None or not (self.training or draws):
            return result
        draws = draws or {}
        if self.config.feedback_weight and self._needs_generator():
            result.feedback_loss = self._feedback_loss(
                image_tokens, self._pictures(pixel_values, target_pixel_values), region_masks, generator, draws
            )
            result.loss = result.loss + self.config.feedback_weight * result.feedback_loss
        if self.config.image_weight and self._needs_generator():
            starts = row_starts(input_ids, attention_mask, document_ids)
            result.image_loss = self._image_loss(
                hidden,
                input_ids,
                starts,
                self._pictures(pixel_values, target_pixel_values),
                image_loss_mask,
                generator,
                draws,
            )
            result.loss = result.loss + self.config.image_weight * result.image_loss
        return result

    def _needs_generator(self) -> bool:
        if self.generator is None:
            raise ValueError(
                "Training with `feedback_weight` or `image_weight` above 0 needs the frozen generator: call "
                "`model.attach_generator(load_generator(PATH))`, or set both weights of the config to 0."
            )
        return True

    def _pictures(self, pixel_values, target_pixel_values):
        """Returns the pictures that the generator must restore, `(images, 3, height, width)` in [0, 1]."""
        if target_pixel_values is None:
            config = self.config.vision_config
            return unnormalize(pixel_values, config.image_mean, config.image_std)
        return target_pixel_values.float().clamp(-1, 1) / 2 + 0.5

    def _feedback_loss(self, image_tokens, pictures, region_masks, generator, draws):
        """The same image from its own queries (CSR, Eq. 5), averaged over the region where there is one."""
        draw = draws.get("feedback", Draws())
        latents = self._encode(pictures, draw, generator)
        mask = None
        if region_masks is not None:
            height, width = latents.shape[-2:]
            mask = region_to_patches(region_masks, height, width).mT.unflatten(-1, (height, width))
        feedback = DiffusionFeedback(self.generator.denoiser, TIMESTEP_SAMPLERS[self.config.feedback_timesteps])
        losses = feedback(
            latents,
            self.feedback_head(image_tokens),
            mask=mask,
            timesteps=draw.timesteps,
            noise=draw.noise,
            generator=generator,
        )
        return mean_over_valid(losses)

    def _image_loss(self, hidden, input_ids, starts, pictures, image_loss_mask, generator, draws):
        """The next image from what stands before it (NIP, Eq. 3)."""
        draw = draws.get("image", Draws())
        context, lengths = self.image_contexts(hidden, input_ids, starts)
        if self.config.official_image_loss:
            pictures = pictures * 2 - 1  # what the generator then normalises once more
        dropped = draw.dropped
        if dropped is None:
            uniform = torch.rand(len(context), generator=generator, device=context.device)
            dropped = uniform < self.config.null_context_rate
        losses = DiffusionFeedback(self.generator.denoiser)(
            self._encode(pictures, draw, generator),
            self.image_decoder.drop(context, dropped),
            timesteps=draw.timesteps,
            noise=draw.noise,
            generator=generator,
        )
        # A picture behind no more than the first token of its document and its own start has nothing to be drawn from.
        valid = lengths > 2
        if image_loss_mask is not None:
            valid = valid & (image_loss_mask != 0)
        if self.config.official_image_loss:
            return (losses * valid).mean()
        return mean_over_valid(losses, valid)

    def image_contexts(self, hidden_states, input_ids, starts):
        """
        Makes the denoiser's context of what stands before each image start.

        Args:
            hidden_states (`torch.Tensor`): Of the language model, `(batch, tokens, hidden_size)`.
            input_ids (`torch.Tensor`): Shape `(batch, tokens)`.
            starts (`torch.Tensor`): Where the document of each token begins in its row, `(batch, tokens)`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Contexts `(images, queries, context_dim)`, and how many tokens each
            was made of, `(images,)`.
        """
        rows, places = image_places(input_ids, self.config.image_start_token_id)
        states, mask = reversed_contexts(hidden_states, rows, places, starts[rows, places])
        return self.image_decoder(states.to(self.image_decoder.projection.weight.dtype), mask), mask.sum(1)

    def _encode(self, pictures, draw, generator):
        return self.generator.to(pictures.device).encode(pictures, noise=draw.latent_noise, generator=generator)

    def prepare_inputs_for_generation(
        self, input_ids, pixel_values=None, region_masks=None, is_first_iteration=False, **kwargs
    ):
        """Hands the pictures to the first step only; the cache holds what was read of them."""
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs |= {"pixel_values": pixel_values, "region_masks": region_masks}
        return inputs
