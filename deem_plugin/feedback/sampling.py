"""Pictures that a frozen diffusion model samples from nothing but a context."""

import inspect

import torch


@torch.no_grad()
def sample_pictures(
    diffusion_model,
    context,
    *,
    vector=None,
    steps=50,
    scheduler=None,
    guidance=1.0,
    null_context=None,
    generator=None,
    latents=None,
    strength=1.0,
):
    """
    Samples pictures `(batch, 3, size, size)` in [0, 1] from context alone, starting at pure noise, or at noisy
    latents as image-to-image pipelines do (SDEdit, https://arxiv.org/abs/2108.01073).

    Args:
        diffusion_model (`DiffusionModel`): The frozen diffusion model.
        context (`torch.Tensor`): Shape `(batch, tokens, context_dim)`.
        vector (`torch.Tensor`, *optional*): What modulates the denoiser, `(batch, vector_dim)`, where one does.
        steps (`int`, *optional*, defaults to `50`): Denoising steps.
        scheduler (`SchedulerMixin`, *optional*): Of diffusers, for the model's kind of process; by default DDIM
            (https://arxiv.org/abs/2010.02502), or Euler steps for flow matching.
        guidance (`float`, *optional*, defaults to `1.0`): Scale of classifier-free guidance
            (https://arxiv.org/abs/2207.12598); 1 is none.
        null_context (`torch.Tensor`, *optional*): What guidance leads away from, `(1, tokens, context_dim)`.
        generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Source of the first noise and of the
            scheduler's, on the context's device: one for all, or one a picture.
        latents (`torch.Tensor`, *optional*): Where to start, with noise, `(batch, channels, h, w)`.
        strength (`float`, *optional*, defaults to `1.0`): Share of the steps that are taken, in (0, 1], and so how
            much noise `latents` get, as in diffusers. At 1 they are not looked at.

    Raises:
        ValueError: If guidance is asked for without a null context, there is not one source of noise a picture, or
            `strength` is not in (0, 1], or below 1 without latents.
    """
    from diffusers.utils.torch_utils import randn_tensor

    if guidance != 1.0 and null_context is None:
        raise ValueError(f"guidance={guidance} needs a `null_context` to lead away from; give one, or guidance=1.")
    if isinstance(generator, list) and len(generator) != len(context):
        raise ValueError(
            f"Got {len(generator)} sources of noise for {len(context)} pictures; expected one, or one each."
        )
    if not 0 < strength <= 1 or (strength < 1 and latents is None):
        raise ValueError(f"strength={strength} must be in (0, 1], and 1 where there are no latents to start at.")
    denoiser = diffusion_model.denoiser
    scheduler = scheduler or denoiser.process.sampler()
    scheduler.set_timesteps(steps, device=context.device)
    shape = (len(context), denoiser.channels, denoiser.sample_size, denoiser.sample_size)
    noise = randn_tensor(shape, generator=generator, device=context.device)
    timesteps = scheduler.timesteps[-max(1, round(steps * strength)) :]
    if strength == 1.0:
        latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    else:
        latents = _noised(scheduler, latents, noise, timesteps)
    contexts = context if guidance == 1.0 else torch.cat([null_context.to(context).expand_as(context), context])
    vectors = vector
    if vector is not None and guidance != 1.0:
        vectors = torch.cat([torch.zeros_like(vector), vector])
    options = _options_of_step(scheduler, generator)
    for timestep in timesteps:
        inputs = latents
        if hasattr(scheduler, "scale_model_input"):
            inputs = scheduler.scale_model_input(latents, timestep)
        if guidance != 1.0:
            inputs = torch.cat([inputs, inputs])
        prediction = denoiser.at_times(inputs, timestep.expand(len(inputs)), contexts, vectors).float()
        if guidance != 1.0:
            without, given = prediction.chunk(2)
            prediction = without + guidance * (given - without)
        latents = scheduler.step(prediction, timestep, latents, **options).prev_sample
    return diffusion_model.codec.decode(latents) / 2 + 0.5


def _noised(scheduler, latents, noise, timesteps):
    """Returns latents with the noise of the first of the last `timesteps` of a scheduler, which goes on from there."""
    if not hasattr(scheduler, "scale_noise"):
        return scheduler.add_noise(latents, noise, timesteps[:1])
    scheduler.set_begin_index(len(scheduler.timesteps) - len(timesteps))
    return scheduler.scale_noise(latents, timesteps[:1], noise)


def _options_of_step(scheduler, generator):
    """Returns what `scheduler.step` takes of ours: schedulers that add noise want its source, others know none."""
    return {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
