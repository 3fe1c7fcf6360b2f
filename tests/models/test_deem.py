"""The interleaved model as its users meet it: made of parts, trained, saved, asked, and told to draw."""

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessor,
    LogitsProcessorList,
)

from deem_plugin.feedback import load_diffusion_model
from deem_plugin.models import Draws, assemble_deem, drawing, generate_images, generate_interleaved
from deem_plugin.models.interleaving import row_starts

from ..feedback.tiny_diffusion_models import CONTEXT_DIM, save_diffusion_model
from ..text_tokenizers import TOKENIZERS
from ..tiny import tiny_image
from .tiny_deem import QUERIES, language_tokenizer, official_labels, tiny_deem, tiny_language_model, tiny_tower


@pytest.fixture(scope="module")
def diffusion_model(tmp_path_factory):
    return load_diffusion_model(save_diffusion_model(tmp_path_factory.mktemp("diffusion_model"), "sd1"))


def inputs_of(processor, texts, count, **options):
    """Texts with `count` pictures in all, and labels by the official rules."""
    images = [tiny_image(index, size=(64, 64)) for index in range(count)]
    inputs = processor(text=texts, images=images or None, padding=True, return_tensors="pt", **options)
    inputs["labels"] = official_labels(processor, inputs)
    return inputs


TEXTS = ["<image>a red cat<image>and a dog", "some words<image>yes"]


def test_the_parts_are_taken_as_they_are():
    torch.manual_seed(3)
    tokenizer = language_tokenizer()
    language_model, tower = tiny_language_model(tokenizer), tiny_tower()
    before = {k: v.clone() for part in (language_model, tower) for k, v in part.state_dict().items()}

    model, processor = assemble_deem(language_model, tokenizer, tower, context_dim=16, image_decoder_heads=4)

    after = {**model.language_model.state_dict(), **model.vision_tower.state_dict()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert model.connector.weight.std().item() == pytest.approx(1e-3, rel=0.2)
    assert (model.new_head.bias == -5).all()
    assert len(tokenizer) == 259 and len(processor.tokenizer) == 261
    with pytest.raises(ValueError, match="already knows .'<image_start>', '<image>'."):
        assemble_deem(language_model, processor.tokenizer, tower)


def test_three_losses_come_under_their_names_and_add_up(diffusion_model):
    model, processor = tiny_deem()
    model.attach_diffusion_model(diffusion_model)
    inputs = inputs_of(processor, TEXTS, 3)

    output = model.train()(**inputs, generator=torch.Generator().manual_seed(0))
    output.loss.backward()

    # Three pictures in two documents.
    total = output.lm_loss + 5 * output.image_loss + 5 * output.feedback_loss * 3 / 2
    torch.testing.assert_close(output.loss, total)
    assert output.logits.shape == (*inputs["input_ids"].shape, 261)
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert not without
    assert all(p.grad is None for p in diffusion_model.denoiser.model.parameters())
    assert not any("unet" in name or "vae" in name for name in model.state_dict())


def test_a_loss_of_weight_zero_is_not_computed(diffusion_model, monkeypatch):
    model, processor = tiny_deem(image_weight=0.0)
    model.attach_diffusion_model(diffusion_model)
    monkeypatch.setattr(model.denoising, "image_loss", None)
    inputs = inputs_of(processor, TEXTS, 3)

    output = model.train()(**inputs)

    assert output.image_loss is None and output.feedback_loss is not None
    model.config.feedback_weight = 0.0
    assert model(**inputs).feedback_loss is None
    model.config.feedback_weight, model.denoising.diffusion_model = 5.0, None
    with pytest.raises(ValueError, match="needs the frozen diffusion model"):
        model(**inputs)
    assert model.eval()(**inputs).loss is not None  # reading needs none


def test_both_losses_of_the_diffusion_model_ask_its_autoencoder_once(diffusion_model, monkeypatch):
    model, processor = tiny_deem()
    model.attach_diffusion_model(diffusion_model)
    asked = []
    posterior = diffusion_model.codec.posterior
    monkeypatch.setattr(
        diffusion_model.codec, "posterior", lambda pictures: asked.append(len(pictures)) or posterior(pictures)
    )

    model.train()(**inputs_of(processor, TEXTS, 3))

    assert asked == [3]


def test_packed_documents_do_not_see_each_other(diffusion_model):
    model, processor = tiny_deem()
    model.attach_diffusion_model(diffusion_model)
    rows = [inputs_of(processor, [text], count) for text, count in ((TEXTS[0], 2), ("two words<image>yes", 1))]
    lengths = [row["input_ids"].shape[1] for row in rows]
    packed = {
        "input_ids": torch.cat([row["input_ids"] for row in rows] + [torch.zeros(1, 3).long()], dim=1),
        "labels": torch.cat([row["labels"] for row in rows] + [torch.full((1, 3), -100)], dim=1),
        "pixel_values": torch.cat([row["pixel_values"] for row in rows]),
        "document_ids": torch.tensor([[0] * lengths[0] + [1] * lengths[1] + [-1] * 3]),
    }
    torch.manual_seed(0)
    shape = (3, 4, diffusion_model.denoiser.sample_size, diffusion_model.denoiser.sample_size)
    draws = Draws(*torch.randn(2, *shape), timesteps=torch.tensor([10, 500, 900]), dropped=torch.zeros(3).bool())
    rows[1]["pixel_values"] = packed["pixel_values"][2:]

    together = model.eval()(**packed, draws={"image": draws, "feedback": draws})
    apart = [model(**row) for row in rows]

    alone = torch.cat([output.last_hidden_state for output in apart], dim=1)
    torch.testing.assert_close(together.last_hidden_state[:, : sum(lengths)], alone, atol=1e-5, rtol=1e-5)
    contexts = torch.cat(
        [
            model.denoising.contexts(o.last_hidden_state, r["input_ids"], torch.zeros_like(r["input_ids"]))[0]
            for o, r in zip(apart, rows, strict=True)
        ]
    )
    ours, lengths_of = model.denoising.contexts(
        together.last_hidden_state,
        packed["input_ids"],
        row_starts(packed["input_ids"], document_ids=packed["document_ids"]),
    )
    torch.testing.assert_close(ours, contexts, atol=1e-5, rtol=1e-5)
    assert lengths_of.tolist() == [2, 2 + 2 + QUERIES - 1 + 9, 11]
    # The first picture follows `<s>` at once: its own loss does not count in the mean.
    pair = Draws(draws.latent_noise[:2], draws.noise[:2], draws.timesteps[:2], draws.dropped[:2])
    first = model(**rows[0], draws={"image": pair})
    rest = Draws(draws.latent_noise[2:], draws.noise[2:], draws.timesteps[2:], draws.dropped[2:])
    second = model(**rows[1], draws={"image": rest})
    torch.testing.assert_close(together.image_loss, (first.image_loss + second.image_loss) / 2)


def test_saved_and_loaded_by_the_auto_classes_it_is_the_same_without_any_diffusion_model(tmp_path, diffusion_model):
    model, processor = tiny_deem()
    model.attach_diffusion_model(diffusion_model)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    inputs = inputs_of(processor, TEXTS, 3)

    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)

    assert loaded.diffusion_model is None
    assert torch.equal(model.eval()(**inputs).logits, loaded.eval()(**inputs).logits)
    assert all(torch.equal(a, b) for a, b in zip(inputs.values(), inputs_of(again, TEXTS, 3).values(), strict=True))
    assert loaded.generation_config.eos_token_id == [2, processor.image_start_token_id]


def test_tied_language_models_stay_tied(tmp_path):
    model, processor = tiny_deem(language_options={"tie_word_embeddings": True})
    model.save_pretrained(tmp_path)

    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()

    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    inputs = inputs_of(processor, TEXTS, 3)
    assert torch.equal(model.eval()(**inputs).logits, loaded(**inputs).logits)


WITH_MAPS = {"language_synchroniser": {"frequency": 1, "num_heads": 4}, "tower_options": {"multiscale": True}}


def open_gates(model):
    for block in model.language_synchroniser.blocks.values():
        torch.nn.init.constant_(block.gate, 0.8)


@pytest.mark.parametrize("maps", [False, True], ids=["plain", "maps"])
@pytest.mark.parametrize("beams", [1, 2])
def test_with_cache_equals_without_and_a_batch_equals_one_at_a_time(maps, beams):
    model, processor = tiny_deem(**WITH_MAPS if maps else {})
    if maps:
        open_gates(model)
    model.eval()
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": beams}
    whole = {"return_dict_in_generate": True, "output_logits": True}
    images = [tiny_image(index, size=(64, 64)) for index in range(3)]

    batch = processor(text=TEXTS, images=images, padding=True, padding_side="left", return_tensors="pt")
    cached = model.generate(**batch, **options, **whole)
    plain = model.generate(**batch, **options, **whole, use_cache=False)
    alone = [
        model.generate(**processor(text=[text], images=some, return_tensors="pt"), **options)[0, -8:].tolist()
        for text, some in zip(TEXTS, (images[:2], images[2:]), strict=True)
    ]
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), atol=1e-5, rtol=1e-5)
    assert torch.equal(cached.sequences, plain.sequences)
    assert cached.sequences[:, -8:].tolist() == alone
    # It does look at the pictures, not only at their number.
    logits = model(**batch).logits[:, -1]
    batch["pixel_values"] = batch["pixel_values"].flip(0)
    assert (model(**batch).logits[:, -1] - logits).abs().max() > 0.02


def test_a_micro_batch_weighs_by_its_share_of_tokens_and_its_own_counts(diffusion_model):
    """As under the stock Trainer, which gives `num_items_in_batch` and no `step_totals`."""
    model, processor = tiny_deem()
    model.attach_diffusion_model(diffusion_model)
    inputs = inputs_of(processor, TEXTS, 3) | {"image_loss_mask": torch.tensor([1, 0, 1])}
    tokens = (inputs["labels"][:, 1:] != -100).sum()

    def losses(**options):
        torch.manual_seed(0)
        return model.train()(**inputs, generator=torch.Generator().manual_seed(0), **options)

    whole, half = losses(num_items_in_batch=tokens), losses(num_items_in_batch=2 * tokens)
    counted = losses(step_totals=model.totals_of(inputs))

    torch.testing.assert_close(half.loss, whole.loss / 2)
    torch.testing.assert_close(half.image_loss, whole.image_loss / 2)
    torch.testing.assert_close(whole.image_loss, counted.image_loss)


def test_generation_counts_the_new_tokens():
    """Its methods take the width of the logits from the config."""
    model, processor = tiny_deem(**WITH_MAPS)
    open_gates(model.eval())
    inputs = processor(text="<image>a a", images=[tiny_image(0, size=(64, 64))], return_tensors="pt")
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}

    found = model.generate(
        **inputs,
        **options,
        num_beams=3,
        num_return_sequences=3,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    scores = model.compute_transition_scores(found.sequences, found.scores, found.beam_indices)

    torch.testing.assert_close(scores.sum(1), found.sequences_scores)
    looked_up = model.generate(**inputs, **options, prompt_lookup_num_tokens=2)
    assert torch.equal(looked_up, model.generate(**inputs, **options))
    with pytest.raises(ValueError, match="cannot be resized.*extra_tokens"):
        model.resize_token_embeddings(len(processor.tokenizer))


def test_gradient_checkpointing_changes_no_gradient(diffusion_model):
    inputs, gradients = None, []
    for checkpointing in (False, True):
        model, processor = tiny_deem(**WITH_MAPS)
        model.attach_diffusion_model(diffusion_model)
        open_gates(model)
        inputs = inputs or inputs_of(processor, TEXTS, 3)
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()(**inputs, generator=torch.Generator().manual_seed(0)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})

    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_pictures_depend_on_text_and_seed_alone(diffusion_model):
    model, processor = tiny_deem()
    model.attach_diffusion_model(diffusion_model)
    model.eval()
    texts = ["a red cat<image_start>", "a blue and very big dog<image_start>"]
    batch = processor(text=texts, padding=True, return_tensors="pt")

    both = generate_images(model, batch, [1, 2], steps=2)
    second = generate_images(model, processor(text=texts[1:], return_tensors="pt"), [2], steps=2)
    other = generate_images(model, processor(text=texts[1:], return_tensors="pt"), [3], steps=2)

    assert both[0].size == (diffusion_model.image_size, diffusion_model.image_size)
    difference = (torch.tensor(list(both[1].getdata())) - torch.tensor(list(second[0].getdata()))).abs().max()
    assert difference <= 1  # of 255: batches round differently
    assert both[1].tobytes() != other[0].tobytes()
    with pytest.raises(ValueError, match=r"Rows \[0\] have no <image_start>"):
        generate_images(model, processor(text=["no picture"], return_tensors="pt"), [1])


def model_with_maps(diffusion_model, **options):
    """Makes a model whose language model and UNet both see the pictures' maps well."""
    unet = {
        key: diffusion_model.denoiser.model.config[key]
        for key in ("sample_size", "block_out_channels", "layers_per_block")
    }
    model, processor = tiny_deem(
        **options, **WITH_MAPS, unet_synchroniser={"unet": unet, "inner_dim": 32, "num_heads": 4}
    )
    model.attach_diffusion_model(diffusion_model)
    open_gates(model)
    with torch.no_grad():
        for block in (*model.denoising.unet_synchroniser.skip_blocks, model.denoising.unet_synchroniser.middle_block):
            torch.nn.init.normal_(block.zero.weight, std=5.0)
        for adapter in model.vision_tower.encoder.adapters.parameters():
            torch.nn.init.normal_(adapter)  # beside positions of size one, new adapters would not be seen
    return model.eval(), processor


def test_a_drawing_sees_the_picture_before_it_in_its_own_row(diffusion_model):
    model, processor = model_with_maps(diffusion_model)
    images = [tiny_image(index, size=(64, 64)) for index in range(3)]
    texts = ["<image>a cat<image_start>", "<image>b<image>and so on<image_start>"]

    together = generate_images(
        model, processor(text=texts, images=images, padding=True, return_tensors="pt"), [1, 2], steps=2
    )
    alone = [
        generate_images(model, processor(text=[text], images=some, return_tensors="pt"), [seed], steps=2)[0]
        for text, some, seed in zip(texts, (images[:1], images[1:]), (1, 2), strict=True)
    ]
    red = [Image.new("RGB", (64, 64), (255, 0, 0))]
    other = generate_images(model, processor(text=texts[:1], images=red, return_tensors="pt"), [1], steps=2)[0]

    for one, two in zip(together, alone, strict=True):
        assert (to_tensor(one) - to_tensor(two)).abs().max() < 0.02
    assert (to_tensor(other) - to_tensor(alone[0])).abs().max() > 0.02


class Scripted(LogitsProcessor):
    """Has a model say what is written."""

    def __init__(self, tokens):
        self.tokens = iter(tokens)

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([next(self.tokens)]), 0.0)


@pytest.mark.parametrize("kind", [*TOKENIZERS, "with maps"])
def test_text_and_pictures_come_in_turn_from_the_very_tokens_that_were_generated(diffusion_model, kind, monkeypatch):
    tokenizer = TOKENIZERS.get(kind, TOKENIZERS["metaspace"])()
    given = {"tokenizer": tokenizer, "language_options": {"eos_token_id": tokenizer.eos_token_id}}
    if kind == "with maps":
        model, processor = model_with_maps(diffusion_model, **given)
    else:
        model, processor = tiny_deem(**given)
        model.attach_diffusion_model(diffusion_model)
        model.eval()
    contexts, maps, attach = [], [], model.denoising.attached_previous

    def sample(diffusion_model, context, **options):
        contexts.append(context)
        return torch.rand(1, 3, 32, 32, generator=options["generator"][0])

    def attached(shown, *args, **options):
        maps.append(shown)
        return attach(shown, *args, **options)

    monkeypatch.setattr(drawing, "sample_pictures", sample)
    monkeypatch.setattr(model.denoising, "attached_previous", attached)
    start, slots = processor.image_start_token_id, [processor.image_token_id] * QUERIES
    words = tokenizer(["big red dog", " yes", "no"], add_special_tokens=False)["input_ids"]
    # As no tokenizer would write it: letter by letter.
    spelt = tokenizer.convert_tokens_to_ids(list("red"))
    says = [[*words[0], start], [*spelt, *words[1], start], [*words[2], tokenizer.eos_token_id]]
    given = processor(text="<image>a", images=[tiny_image(0, size=(64, 64))], return_tensors="pt")
    read = []
    hook = model.register_forward_pre_hook(lambda _, args, inputs: read.append(inputs["input_ids"]), with_kwargs=True)

    script = LogitsProcessorList([Scripted(sum(says, []))])
    parts = generate_interleaved(model, processor, given, seed=5, steps=1, logits_processor=script, max_new_tokens=20)

    hook.remove()
    written = given["input_ids"][0].tolist() + says[0] + slots + says[1] + slots + says[2]
    assert torch.cat(read, dim=1)[0].tolist() == written[:-1]
    assert parts[::2] == [tokenizer.decode(stretch[:-1]) for stretch in says]
    # Each picture is that of all that stands before it, read at once and without a cache.
    pixels = given["pixel_values"]
    for number, picture in enumerate(parts[1::2]):
        end = [place for place, one in enumerate(written) if one == start][number + 1] + 1
        before = {"input_ids": torch.tensor([written[:end]]), "pixel_values": pixels}
        [expected] = generate_images(model, before, [5 + number], steps=1)
        assert picture.tobytes() == expected.tobytes()
        torch.testing.assert_close(contexts[number], contexts[-1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(maps[number], maps[-1], atol=1e-5, rtol=1e-5)
        assert {len(level) for level in maps[number].values()} <= {number + 1}
        drawn = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
        pixels = torch.cat([pixels, drawn])
    assert len(parts) == 5 and (contexts[0] - contexts[1]).abs().max() > 1e-3


def test_text_and_pictures_in_turn_are_one_answer_to_one_prompt(diffusion_model):
    model, processor = tiny_deem()
    inputs = processor(text="a", return_tensors="pt")

    with pytest.raises(ValueError, match="needs the diffusion model"):
        generate_interleaved(model, processor, inputs)
    model.attach_diffusion_model(diffusion_model)
    with pytest.raises(ValueError, match="leave `num_beams` out"):
        generate_interleaved(model, processor, inputs, num_beams=2)
    with pytest.raises(ValueError, match="Got 2 prompts"):
        generate_interleaved(model, processor, processor(text=["a", "b"], return_tensors="pt"))
    for options in ({"num_return_sequences": 2, "do_sample": True}, {"use_cache": False}):
        with pytest.raises(ValueError, match="one answer to one prompt, with a cache"):
            generate_interleaved(model, processor, inputs, **options)


def test_a_picture_comes_where_the_prompt_ends_in_its_start_and_whatever_else_ends_a_text(diffusion_model):
    model, processor = tiny_deem()
    model.eval().attach_diffusion_model(diffusion_model)
    inputs = processor(text="<image>a<image_start>", images=[tiny_image(0, size=(64, 64))], return_tensors="pt")
    b, start, end = processor.tokenizer("b<image_start>c", add_special_tokens=False)["input_ids"]
    script = LogitsProcessorList([Scripted([b, start, end])])

    parts = generate_interleaved(
        model, processor, inputs, steps=1, logits_processor=script, max_new_tokens=9, eos_token_id=end
    )

    [first] = generate_images(model, inputs, [0], steps=1)
    assert parts[0].tobytes() == first.tobytes()
    assert parts[1] == "b" and isinstance(parts[2], Image.Image) and parts[3:] == ["c"]


def test_no_more_is_kept_of_a_row_than_is_asked_for():
    model, processor = tiny_deem()
    inputs = inputs_of(processor, TEXTS[1:], 1)
    del inputs["labels"]
    sizes = []
    model.language_model.get_output_embeddings().register_forward_hook(lambda _, args, out: sizes.append(out.shape[1]))
    asked = []
    model.language_model.register_forward_pre_hook(lambda _, args, kwargs: asked.append(kwargs), with_kwargs=True)

    whole = model.eval()(**inputs)
    few = model(**inputs, logits_to_keep=torch.tensor([2, 5]))
    model.generate(**inputs, max_new_tokens=2, do_sample=False)

    torch.testing.assert_close(few.logits, whole.logits[:, [2, 5]])
    assert sizes == [inputs["input_ids"].shape[1], 2, 1, 1]
    assert not any(kwargs.get("output_hidden_states") for kwargs in asked)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_moves_no_token_of_a_model_with_absolute_positions(diffusion_model, side):
    tokenizer = language_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1)
    language_model = GPT2LMHeadModel(config)
    torch.nn.init.normal_(language_model.transformer.wpe.weight, std=0.5)
    model, processor = assemble_deem(
        language_model, tokenizer, tiny_tower(), context_dim=CONTEXT_DIM, image_decoder_heads=4
    )
    model.attach_diffusion_model(diffusion_model)
    texts = ["a red cat<image_start>", "a blue and very big dog<image_start>"]
    batch = processor(text=texts, padding=True, padding_side=side, return_tensors="pt")
    alone = processor(text=texts[:1], return_tensors="pt")

    hidden = model.eval()(**batch).last_hidden_state[0][batch["attention_mask"][0].bool()]
    pictures = generate_images(model, batch, [1, 2], steps=1)

    torch.testing.assert_close(hidden, model(**alone).last_hidden_state[0], atol=1e-5, rtol=1e-5)
    [picture] = generate_images(model, alone, [1], steps=1)
    assert (to_tensor(pictures[0]) - to_tensor(picture)).abs().max() < 0.02
    if side == "left":
        answers = model.generate(**batch, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
        answer = model.generate(**alone, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert answers[0, -3:].tolist() == answer[0, -3:].tolist()
