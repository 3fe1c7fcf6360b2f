"""Every image counts alike, whatever the batch is cut into; the log agrees with the gradient."""

import pytest
import torch
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    Trainer,
)

from ..tiny import (
    CHAT_TEMPLATE,
    IMAGE_SIZE,
    PATCH_SIZE,
    tiny_clip_config,
    tiny_image,
    tiny_llama_config,
    tiny_llava,
    tiny_tokenizer,
)
from .helpers import relative_difference, samples
from .runs import (
    UndrawnFeedback,
    by_hand,
    logged,
    mixed,
    pictures_of,
    pixel_diffusion_model,
    rows_of_ranks,
    run,
    run_two_ranks,
    undrawn_callback,
)

EXACT = 1e-5


def assert_same(expected, gradients):
    assert relative_difference(expected, gradients) < EXACT
    assert relative_difference(expected, gradients, "vision_tower") < EXACT
    assert relative_difference(expected, gradients, "feedback_conditioner") < EXACT


class CutTrainer(Trainer):
    """Calls the model once for each chunk of a micro-batch, as losses of chunks or pairs do."""

    chunk = 2

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        count = len(inputs["input_ids"])
        chunks = [
            {name: value[start : start + self.chunk] for name, value in inputs.items()}
            for start in range(0, count, self.chunk)
        ]
        return sum(model(**chunk).loss for chunk in chunks) / len(chunks)


class FineCutTrainer(CutTrainer):
    chunk = 1


def test_the_gradient_is_that_of_the_sum_over_the_images_by_the_conversations(tmp_path):
    _, processor = tiny_llava()
    expected, errors = by_hand(samples(processor), conversations=4)

    trainer, (gradients,) = run(tmp_path, undrawn_callback())

    assert_same(expected, gradients)
    assert logged(trainer, "feedback_loss") == [pytest.approx(errors.mean().item(), rel=1e-5)]
    plain = run(tmp_path)[1][0]
    assert relative_difference(plain, {name: gradients[name] for name in plain}, "vision_tower") > 0.01


@pytest.mark.parametrize(
    "settings",
    [
        {"trainer_class": CutTrainer},
        {"trainer_class": FineCutTrainer},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    ],
    ids=["two calls", "four calls", "two micro-batches", "four micro-batches"],
)
def test_the_cut_of_a_batch_does_not_change_its_feedback(tmp_path, settings):
    _, processor = tiny_llava()
    expected, errors = by_hand(samples(processor), conversations=4)

    trainer, (gradients,) = run(tmp_path, undrawn_callback(), **settings)

    assert_same(expected, gradients)
    assert logged(trainer, "feedback_loss") == [pytest.approx(errors.mean().item(), rel=1e-5)]


@pytest.mark.parametrize(
    "order", [[0, 2, 4, 6, 1, 3, 5, 7], [0, 1, 2, 3, 4, 5, 6, 7]], ids=["text micro-batches", "mixed micro-batches"]
)
@pytest.mark.parametrize("batch, accumulation", [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_text_beside_pictures_does_not_change_their_weight(tmp_path, batch, accumulation, order):
    """Four conversations with a picture and four without: each picture counts an eighth, in whatever micro-batch."""
    _, processor = tiny_llava()
    rows = [mixed(processor)[index] for index in order]
    expected, errors = by_hand(rows, conversations=8)

    trainer, (gradients,) = run(
        tmp_path,
        undrawn_callback(),
        rows=rows,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )

    assert_same(expected, gradients)
    assert logged(trainer, "feedback_loss") == [pytest.approx(errors.mean().item(), rel=1e-5)]


def test_the_log_is_the_mean_over_the_images_of_all_steps_since_the_last(tmp_path):
    """A step with four pictures and one with two, logged once: six images, not two steps."""
    _, processor = tiny_llava()
    pictures, text = samples(processor, 6), samples(processor, 2, with_images=False)
    settings = {"max_steps": 2, "learning_rate": 0.0, "logging_steps": 2}

    trainer, _ = run(tmp_path, undrawn_callback(), rows=[*pictures, *text], **settings)

    _, errors = by_hand(pictures, conversations=6)
    assert logged(trainer, "feedback_loss") == [pytest.approx(errors.mean().item(), rel=1e-5)]


def test_the_shorter_last_accumulation_of_an_epoch_is_weighted_right(tmp_path):
    """Six samples in accumulations of four: the second step holds two micro-batches of one."""
    _, processor = tiny_llava()
    rows = samples(processor, 6)
    settings = {"max_steps": 2, "learning_rate": 0.0, "rows": rows}

    _, steps = run(
        tmp_path, undrawn_callback(), per_device_train_batch_size=1, gradient_accumulation_steps=4, **settings
    )

    assert_same(by_hand(rows[:4], conversations=4)[0], steps[0])
    assert_same(by_hand(rows[4:], conversations=2)[0], steps[1])


@pytest.mark.parametrize(
    "batch, accumulation, counts", [(4, 1, [4, 2]), (4, 2, [6]), (2, 2, [4, 2])], ids=["batch", "cut", "accumulation"]
)
def test_the_smaller_last_batch_of_an_epoch_is_weighted_right(tmp_path, batch, accumulation, counts):
    """Six samples: the conversations of a step are those that it reads."""
    _, processor = tiny_llava()
    rows = samples(processor, 6)

    _, steps = run(
        tmp_path,
        undrawn_callback(),
        rows=rows,
        max_steps=2 * len(counts),
        learning_rate=0.0,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )

    for epoch in (steps[: len(counts)], steps[len(counts) :]):
        first = 0
        for gradients, count in zip(epoch, counts, strict=True):
            assert_same(by_hand(rows[first : first + count], conversations=count)[0], gradients)
            first += count


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pictures", "text rank", "text micro-batch"])
def test_two_ranks_give_the_feedback_of_one(tmp_path, kind):
    _, processor = tiny_llava()
    rows = rows_of_ranks(processor, kind)
    expected, errors = by_hand(rows, conversations=4)

    two = run_two_ranks(tmp_path, kind)

    assert_same(expected, {name: two["gradients"][name] for name in expected})
    assert two["feedback_loss"] == pytest.approx(errors.mean().item(), rel=1e-5)


def tiny_llava_next():
    """Makes a LLaVA-NeXT that cuts wide and tall pictures into two tiles of 32 pixels beside a thumbnail."""
    torch.manual_seed(0)
    grids = [[IMAGE_SIZE, 2 * IMAGE_SIZE], [2 * IMAGE_SIZE, IMAGE_SIZE], [2 * IMAGE_SIZE, 2 * IMAGE_SIZE]]
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            image_grid_pinpoints=grids,
        ),
        tokenizer=tiny_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )
    config = LlavaNextConfig(
        vision_config=tiny_clip_config(),
        text_config=tiny_llama_config(len(processor.tokenizer)),
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grids,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return LlavaNextForConditionalGeneration(config), processor


def tiles_collator(model, processor):
    """Returns a collator of pairs of text and picture, which lets the processor cut the pictures."""

    def collate_tiles(rows):
        texts, images = zip(*rows, strict=True)
        batch = processor(text=list(texts), images=list(images), padding=True, return_tensors="pt")
        unseen = (batch["input_ids"] == model.config.image_token_index) | (batch["attention_mask"] == 0)
        return {**batch, "labels": batch["input_ids"].masked_fill(unseen, -100)}

    return collate_tiles


def tiles_by_hand(rows):
    """Oracle: the mean over the tiles and the thumbnail of each picture, summed, by the pictures."""
    model, processor = tiny_llava_next()
    callback = undrawn_callback()
    callback.attach(model, processor)
    feedback = UndrawnFeedback(pixel_diffusion_model().denoiser)
    images = []
    for _, image in rows:
        # A picture of the size of a grid is cut into its tiles as it is, after the thumbnail.
        tiles = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"][0]
        tokens = model.model.vision_tower(tiles, output_hidden_states=True).hidden_states[-2][:, 1:]
        images.append(feedback(2 * pictures_of(processor, tiles) - 1, callback.conditioner(tokens)).mean())
    loss = model(**tiles_collator(model, processor)(rows)).loss
    (loss + callback.config.weight * sum(images) / len(rows)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients, torch.stack(images).detach()


@pytest.mark.parametrize("batch, accumulation", [(3, 1), (1, 3)])
def test_tiles_do_not_make_a_picture_heavier(tmp_path, batch, accumulation):
    """Pictures of two and of four tiles, each with its thumbnail, in one call and in three."""
    model, processor = tiny_llava_next()
    rows = [("<image>what", tiny_image(i, size)) for i, size in enumerate(((64, 32), (64, 64), (32, 64)))]
    expected, errors = tiles_by_hand(rows)

    trainer, (gradients,) = run(
        tmp_path,
        undrawn_callback(),
        model=model,
        processor=processor,
        rows=rows,
        data_collator=tiles_collator(model, processor),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )

    assert_same(expected, gradients)
    assert logged(trainer, "feedback_loss") == [pytest.approx(errors.mean().item(), rel=1e-5)]
