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
):
    """
    Samples pictures `(batch, 3, size, size)` in [0, 1] from context alone, starting at pure noise.

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

    Raises:
        ValueError: If guidance is asked for without a null context, or there is not one source of noise a picture.
    """
    from diffusers.utils.torch_utils import randn_tensor

    if guidance != 1.0 and null_context is None:
        raise ValueError(f"guidance={guidance} needs a `null_context` to lead away from; give one, or guidance=1.")
    if isinstance(generator, list) and len(generator) != len(context):
        raise ValueError(
            f"Got {len(generator)} sources of noise for {len(context)} pictures; expected one, or one each."
        )
    denoiser = diffusion_model.denoiser
    scheduler = scheduler or denoiser.process.sampler()
    scheduler.set_timesteps(steps, device=context.device)
    shape = (len(context), denoiser.channels, denoiser.sample_size, denoiser.sample_size)
    latents = randn_tensor(shape, generator=generator, device=context.device)
    latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
    contexts = context if guidance == 1.0 else torch.cat([null_context.to(context).expand_as(context), context])
    vectors = vector
    if vector is not None and guidance != 1.0:
        vectors = torch.cat([torch.zeros_like(vector), vector])
    options = _options_of_step(scheduler, generator)
    for timestep in scheduler.timesteps:
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


def _options_of_step(scheduler, generator):
    """Returns what `scheduler.step` takes of ours: schedulers that add noise want its source, others know none."""
    return {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
