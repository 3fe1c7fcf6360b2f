import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from deem_plugin.feedback import DiffusionFeedbackCallback, DiffusionModel, load_diffusion_model
from deem_plugin.feedback.latent_cache import LatentCache, LatentWriter, fingerprint, picture_keys
from deem_plugin.vision.normalization import unnormalize

from ..tiny import tiny_llava, tiny_sd_folder, tiny_vae
from .helpers import collate, feedback_config, pixel_diffusion_model, samples, train
from .tiny_diffusion_models import save_diffusion_model

ROOT = Path(__file__).resolve().parents[2]
SIZE = 32


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return tiny_sd_folder(tmp_path_factory.mktemp("sd"))


@pytest.fixture
def diffusion_model(sd):
    return load_diffusion_model(str(sd))


def pictures(count=4, seed=0, size=SIZE):
    """Pictures as a processor has them: 8 bits, here in [0, 1]."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=rng) / 255


def fill(folder, diffusion_model, given, shard_entries=256):
    """Fills a cache with pictures and returns it, opened."""
    with LatentWriter(folder, fingerprint(diffusion_model), shard_entries) as writer:
        means, deviations = diffusion_model.posterior(given)
        for place, key in enumerate(picture_keys(given)):
            writer.add(key, means[place], None if deviations is None else deviations[place])
    return LatentCache(folder, fingerprint(diffusion_model))


def callback(sd, **settings):
    return DiffusionFeedbackCallback(feedback_config(diffusion_model={"path": str(sd), **settings}))


def test_cached_and_uncached_training_agree_step_by_step(sd, diffusion_model, tmp_path):
    """The real callback in a real Trainer, with micro-batches; losses, feedback and gradients are the same bits."""
    _, processor = tiny_llava()
    image_processor = processor.image_processor
    rows = samples(processor, 8)
    pixel_values = collate(rows)["pixel_values"]
    seen = [unnormalize(part, image_processor.image_mean, image_processor.image_std) for part in pixel_values.split(2)]
    for part in seen:
        fill(tmp_path / "cache", diffusion_model, part)
    settings = {"rows": rows, "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}

    plain, expected = train(tmp_path, callback(sd), **settings)
    cached_callback = callback(sd, latent_cache=str(tmp_path / "cache"))
    cached_callback.diffusion_model = diffusion_model
    diffusion_model.codec.vae.encoder = NeverAsked(diffusion_model.codec.vae.encoder)
    cached, gradients = train(tmp_path, cached_callback, **settings)

    for name in ("loss", "feedback_loss"):
        one, two = ([row[name] for row in run.state.log_history if name in row] for run in (plain, cached))
        assert len(one) == 4 and one == two
    for one, two in zip(expected, gradients, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)


class NeverAsked(torch.nn.Module):
    """Has the weights of a module under their names, and fails when it is asked."""

    def __init__(self, module):
        super().__init__()
        for name, child in module.named_children():
            self.add_module(name, child)

    def forward(self, *args):
        raise AssertionError("the VAE encoded a picture that is in the cache")


@pytest.mark.parametrize("name", ["sd1", "sd3", "sana"])
def test_looked_up_latents_are_the_encoded_ones(tmp_path, name):
    diffusion_model = load_diffusion_model(str(save_diffusion_model(tmp_path / "diffusion_model", name)))
    given = pictures(3, size=20)  # resized to the diffusion model's size
    expected = diffusion_model.encode(given, generator=torch.Generator().manual_seed(5))

    diffusion_model.latent_cache = fill(tmp_path / "cache", diffusion_model, given)

    assert torch.equal(diffusion_model.encode(given, generator=torch.Generator().manual_seed(5)), expected)
    if name != "sana":
        assert not torch.equal(diffusion_model.encode(given, generator=torch.Generator().manual_seed(6)), expected)


def test_keys_survive_normalisation_and_tell_flips_and_sizes_apart():
    given = pictures(2)
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    normalised = (given - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)

    assert picture_keys(unnormalize(normalised, mean, std)) == picture_keys(given)
    others = [given, given.flip(-1), given.reshape(2, 3, 16, 64), 1 - given]
    assert len({key for other in others for key in picture_keys(other)}) == 8


def test_a_missing_picture_is_an_error_that_names_it(diffusion_model, tmp_path):
    given = pictures(3)
    cache = fill(tmp_path, diffusion_model, given[:2])

    with pytest.raises(ValueError, match=r"Picture 2 of a batch of 3 .* not among the 2 .*deem cache-latents RECIPE"):
        cache.look_up(given)


def test_a_folder_without_a_cache_is_an_error(diffusion_model, tmp_path):
    with pytest.raises(ValueError, match="no latent cache in .*Fill it by `deem cache-latents"):
        LatentCache(tmp_path / "nothing", fingerprint(diffusion_model))


def test_another_vae_is_refused_and_another_decoder_is_not(diffusion_model, tmp_path):
    fill(tmp_path, diffusion_model, pictures())
    vae = diffusion_model.codec.vae
    with torch.no_grad():
        next(vae.decoder.parameters()).add_(1)
    LatentCache(tmp_path, fingerprint(diffusion_model))

    with torch.no_grad():
        next(vae.encoder.parameters()).add_(1e-3)
    with pytest.raises(
        ValueError, match="another diffusion model: vae_weights is .* there and .* here. Set .*a folder"
    ):
        LatentCache(tmp_path, fingerprint(diffusion_model))
    with pytest.raises(ValueError, match="another diffusion model"):
        LatentWriter(tmp_path, fingerprint(diffusion_model))


def test_another_picture_size_and_another_config_are_refused_by_name(diffusion_model, tmp_path):
    fill(tmp_path, diffusion_model, pictures())
    diffusion_model.denoiser.model.register_to_config(sample_size=8)
    with pytest.raises(ValueError, match="image_size is 32 there and 16 here"):
        LatentCache(tmp_path, fingerprint(diffusion_model))

    codec = type(diffusion_model.codec)(tiny_vae(act_fn="gelu"))
    with pytest.raises(ValueError, match="vae_config.act_fn is 'silu' there and 'gelu' here"):
        LatentCache(tmp_path, fingerprint(DiffusionModel(diffusion_model.denoiser, codec)))


def test_pixel_diffusion_models_have_nothing_to_cache():
    with pytest.raises(ValueError, match="works on pixels.*latent_cache"):
        fingerprint(pixel_diffusion_model())


@pytest.mark.parametrize("where", ["value", "header", "end"])
def test_a_damaged_shard_is_found_and_named(diffusion_model, tmp_path, where):
    given = pictures()
    fill(tmp_path, diffusion_model, given)
    (shard,) = tmp_path.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    if where == "value":
        data[-5] ^= 1  # one bit
    elif where == "header":
        data[3] ^= 255
    else:
        del data[-100:]
    shard.write_bytes(data)

    with pytest.raises(ValueError, match=f"{shard.name} .* is damaged .*Delete this file and run `deem cache-latents"):
        LatentCache(tmp_path, fingerprint(diffusion_model)).look_up(given)


def test_exchanged_entries_are_found(diffusion_model, tmp_path):
    given = pictures(2)
    fill(tmp_path, diffusion_model, given)
    (shard,) = tmp_path.glob("*.safetensors")
    one, two = (key.encode() for key in picture_keys(given))
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[one.decode()], header[two.decode()] = header[two.decode()], header[one.decode()]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    with pytest.raises(ValueError, match="is damaged .the checksum"):
        LatentCache(tmp_path, fingerprint(diffusion_model)).look_up(given)


WRITE_AND_HANG = """
import sys, time
import torch
from deem_plugin.feedback.latent_cache import LatentWriter
writer = LatentWriter(sys.argv[1], {"format": 1}, 2)
for index in range(5):
    writer.add(f"key{index}", torch.full((1, 2, 2), float(index)), torch.ones(1, 2, 2))
(writer.folder / "next.safetensors.partial").write_bytes(b"half a shard")
print("ready", flush=True)
time.sleep(60)
"""


def test_a_kill_loses_the_unfinished_shard_only(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_AND_HANG, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()

    cache = LatentCache(tmp_path, {"format": 1})
    assert len(cache) == 4 and "key3" in cache and "key4" not in cache
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    with LatentWriter(tmp_path, {"format": 1}, 2) as writer:
        writer.add("key4", torch.full((1, 2, 2), 4.0), torch.ones(1, 2, 2))
    assert len(LatentCache(tmp_path, {"format": 1})) == 5
    assert not list(tmp_path.glob("*.partial"))
    assert all((tmp_path / name).read_bytes() == data for name, data in before.items())


@pytest.mark.slow
def test_two_ranks_share_one_cache(sd, diffusion_model, tmp_path):
    """Two processes of torchrun train on one folder, each on its own pictures, as two without a cache do."""
    _, processor = tiny_llava()
    image_processor = processor.image_processor
    for row in samples(processor, 4):
        part = unnormalize(row["pixel_values"][None], image_processor.image_mean, image_processor.image_std)
        fill(tmp_path / "cache", diffusion_model, part)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}

    plain = _two_ranks(tmp_path / "plain", sd)
    cached = _two_ranks(tmp_path / "cached", sd, tmp_path / "cache")

    assert len(plain) == 2 and plain == cached
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == written


def _two_ranks(folder, sd, cache=None):
    """Returns the logged losses of a run of `run_cached` in two processes."""
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29541"]
    command += ["-m", "tests.feedback.run_cached", str(folder), str(sd), *([str(cache)] if cache else [])]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((folder / "losses.json").read_text())


def test_a_shard_is_ordinary_safetensors_of_mean_and_deviation(diffusion_model, tmp_path):
    given = pictures(1)
    fill(tmp_path, diffusion_model, given)
    mean, deviation = diffusion_model.posterior(given)

    (shard,) = tmp_path.glob("*.safetensors")
    with safe_open(shard, framework="pt") as file:
        entry = file.get_tensor(picture_keys(given)[0])
    assert entry.dtype == torch.float32 and torch.equal(entry, torch.stack([mean[0], deviation[0]]))
