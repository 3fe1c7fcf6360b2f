"""Pictures to latents and back: through a frozen VAE, or as they are for a diffusion model that works on pixels."""

import torch


class VaeCodec:
    """
    A frozen `AutoencoderKL` between pictures in [-1, 1] and scaled latents. Like the denoiser it is no `nn.Module`, so
    that no checkpoint and no optimizer ever sees it.
    """

    def __init__(self, vae):
        self.vae = vae.requires_grad_(False).eval()
        if vae.config.get("latents_mean") is not None or vae.config.get("latents_std") is not None:
            raise ValueError(
                "The VAE normalises its latents channel by channel (its config has latents_mean and latents_std). "
                "Known are VAEs with one scaling_factor and shift_factor; choose another VAE or diffusion model."
            )
        # Some VAEs (SD3's, FLUX's) also shift; SD's do not.
        self.shift = vae.config.get("shift_factor") or 0.0
        self.scale = vae.config.scaling_factor

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.vae.config.latent_channels

    @property
    def downscale(self) -> int:
        """Pixels a latent cell spans along each side: 8 for Stable Diffusion."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def to(self, device):
        """Moves the VAE to `device` and returns the codec."""
        self.vae.to(device)
        return self

    @torch.no_grad()
    def posterior(self, pictures):
        """
        Returns what the VAE says of pictures `(batch, 3, height, width)` in [-1, 1] before anything is drawn, all that
        a cache must keep: mean and standard deviation, float32, `(batch, channels, h, w)` each.
        """
        with torch.autocast(pictures.device.type, enabled=False):
            posterior = self.vae.encode(pictures.to(self.vae.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    def draw(self, mean, std, *, noise=None, generator=None):
        """
        Draws latents from a posterior, as the official code does: `(mean + std * noise - shift) * scale`, float32,
        `(batch, channels, h, w)`. Without `noise`, a standard normal draw, `generator` is its source.
        """
        if noise is None:
            noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        # The layout in memory decides how a denoiser's kernels round; a VAE may give another one than a cache does.
        return ((mean + std * noise - self.shift) * self.scale).contiguous()

    def encode(self, pictures, *, noise=None, generator=None):
        """Encodes pictures to scaled latents: [`draw`] from their [`posterior`]."""
        return self.draw(*self.posterior(pictures), noise=noise, generator=generator)

    @torch.no_grad()
    def decode(self, latents):
        """Decodes latents `(batch, channels, h, w)` to pictures `(batch, 3, height, width)`, clamped to [-1, 1]."""
        pictures = self.vae.decode((latents / self.scale + self.shift).to(self.vae.dtype)).sample
        return pictures.float().clamp(-1, 1)


class TinyCodec(VaeCodec):
    """
    A frozen `AutoencoderTiny` (TAESD and its kin, https://github.com/madebyollin/taesd), which has no posterior to
    draw from. It gives the scaled latents of its family at once: the factors in its own config are applied (1 and 0
    in diffusers' defaults), never those of the VAE whose place it takes.
    """

    @torch.no_grad()
    def posterior(self, pictures):
        """Returns what it encodes pictures `(batch, 3, height, width)` in [-1, 1] to, and None: no deviation."""
        with torch.autocast(pictures.device.type, enabled=False):
            (latents,) = self.vae.encode(pictures.to(self.vae.dtype), return_dict=False)
        return latents.float(), None

    def draw(self, mean, std=None, *, noise=None, generator=None):
        """Returns the scaled latents. Nothing is drawn."""
        return ((mean - self.shift) * self.scale).contiguous()


class DeepCompressionCodec(TinyCodec):
    """A frozen `AutoencoderDC` (Sana's, https://arxiv.org/abs/2410.10733), which draws nothing either."""

    @property
    def downscale(self) -> int:
        """Pixels a latent cell spans along each side: 32 for Sana."""
        return self.vae.spatial_compression_ratio


# The autoencoders we know, by the class name in `model_index.json`.
CODECS = {"AutoencoderKL": VaeCodec, "AutoencoderDC": DeepCompressionCodec, "AutoencoderTiny": TinyCodec}


class PixelCodec:
    """The codec of a diffusion model that has no VAE: its latents are the pictures themselves, in [-1, 1]."""

    downscale = 1
    channels = 3

    def to(self, device):
        """Returns the codec; it holds nothing to move."""
        return self

    def posterior(self, pictures):
        """Returns the pictures in float32, and None: no deviation."""
        return pictures.float(), None

    def draw(self, mean, std=None, *, noise=None, generator=None):
        """Returns the pictures. Nothing is drawn."""
        return mean

    def encode(self, pictures, *, noise=None, generator=None):
        """Returns the pictures in float32."""
        return pictures.float()

    def decode(self, latents):
        """Returns the latents clamped to [-1, 1]."""
        return latents.float().clamp(-1, 1)
