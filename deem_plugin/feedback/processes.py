"""Forward processes: how noise is added, what the network then predicts, and how it is told the time."""


class DiffusionProcess:
    """
    The variance-preserving process of DDPM (https://arxiv.org/abs/2006.11239): sqrt(a_t) x0 + sqrt(1 - a_t) noise.

    Args:
        scheduler (`DDPMScheduler`): Betas and prediction type that the network was trained with.
    """

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.num_train_timesteps = scheduler.config.num_train_timesteps

    def noise(self, latents, noise, timesteps):
        """Returns the noisy latents at integer `timesteps`, `(batch, channels, height, width)`."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents, noise, timesteps):
        """
        Returns what the network should predict by the scheduler's prediction type: the noise, the velocity
        sqrt(a) noise - sqrt(1 - a) x0 (https://arxiv.org/abs/2202.00512, App. D), or x0; shape of `latents`.
        """
        prediction_type = self.scheduler.config.prediction_type
        if prediction_type == "epsilon":
            return noise
        if prediction_type == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timesteps)
        if prediction_type == "sample":
            return latents
        raise ValueError(
            f"The diffusion model's scheduler has prediction_type {prediction_type!r}; expected 'epsilon', "
            f"'v_prediction' or 'sample'. Correct `scheduler_config.json` or choose another diffusion model."
        )

    def times(self, timesteps):
        """Returns the times that the network is told: the integer timesteps themselves."""
        return timesteps

    def sampler(self):
        """Returns the diffusers scheduler that draws pictures by this process: DDIM."""
        from diffusers import DDIMScheduler

        return DDIMScheduler.from_config(self.scheduler.config, clip_sample=False)


class FlowProcess:
    """
    Rectified flow (https://arxiv.org/abs/2209.03003): x = (1 - sigma) x0 + sigma noise, target noise - x0.

    Timestep t of `0..T-1` stands for the (t + 1)-th smallest sigma of the scheduler's own grid, so that the samplers
    of timesteps need not know which process they draw for. The grid is shifted by the `shift` of the scheduler's
    config (3 for SD3: sigma = 3u / (1 + 2u) with u = (t + 1) / T). A shift that depends on the resolution
    (`use_dynamic_shifting`, FLUX.1 dev) is a rule for sampling and leaves the grid as it is.

    Args:
        scheduler (`FlowMatchEulerDiscreteScheduler`): As loaded; `set_timesteps` was not called.
    """

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.num_train_timesteps = scheduler.config.num_train_timesteps
        self.sigmas = scheduler.sigmas.flip(0).clone()

    def sigma(self, timesteps):
        """Returns the share of noise at integer `timesteps`, shape `(batch,)`, in (0, 1]."""
        return self.sigmas.to(timesteps.device)[timesteps]

    def noise(self, latents, noise, timesteps):
        """Returns the noisy latents at integer `timesteps`, `(batch, channels, height, width)`."""
        sigma = self.sigma(timesteps).view(-1, 1, 1, 1).to(latents.dtype)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents, noise, timesteps):
        """Returns the velocity from picture to noise, the same at every time."""
        return noise - latents

    def times(self, timesteps):
        """Returns the times that the network is told: sigma * T, float, shape `(batch,)`."""
        return self.sigma(timesteps) * self.num_train_timesteps

    def sampler(self):
        """Returns the diffusers scheduler that draws pictures by this process: Euler."""
        return type(self.scheduler).from_config(self.scheduler.config, use_dynamic_shifting=False)


def forward_process(scheduler):
    """Returns the forward process of a diffusers scheduler: flow matching, or DDPM's."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    known = FlowProcess if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) else DiffusionProcess
    return known(scheduler)
