"""`deem train` on families whose pictures have any size: saved, reloaded by the stock class, reconstructed."""

import json

import pytest
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deem_plugin.feedback.reconstruction import reconstruct_files
from deem_plugin.training.recipes import load_recipe
from deem_plugin.training.run import train

from ..families.builders import build, picture
from ..tiny import tiny_sd_folder
from .helpers import tiny_overrides

TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
TEMPLATE = (
    TURNS + "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>", "<|im_start|>", "<|im_end|>"]
FAMILIES = {
    "qwen3_vl": (hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor),
    "qwen2_5_vl": (hf.Qwen2_5_VLProcessor, hf.Qwen2VLVideoProcessor),
}


def byte_pair_tokenizer():
    """A tokenizer with merges, as Qwen's own: byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<pad>", *SPECIAL])
    tokenizer.train_from_iterator(["What is in the picture? A red square on a blue ground."] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|im_end|>", extra_special_tokens=SPECIAL[:-1]
    )


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """The folder of a tiny checkpoint with its processor, data of pictures of three sizes, and a diffusion model."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_sd_folder(folder / "sd")
    case, tokenizer = build(request.param), byte_pair_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(SPECIAL[:4])
    names = ("vision_start_token_id", "image_token_id", "vision_end_token_id", "video_token_id")
    for name, value in zip(names, ids, strict=True):
        setattr(case.model.config, name, value)
    processor_class, video_class = FAMILIES[request.param]
    case.model.save_pretrained(folder / "model")
    processor = processor_class(case.image_processor, tokenizer, video_class(), chat_template=TEMPLATE)
    processor.save_pretrained(folder / "model")
    (folder / "images").mkdir()
    records = []
    for index in range(8):
        size = ((64, 64), (96, 64), (64, 128))[index % 3]
        picture(*size, index)[0].save(folder / "images" / f"{index}.png")
        question = "What is in the picture?" if index == 5 else "<image>\nWhat is in the picture?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "A red square."}]
        records.append({"id": index, "conversations": turns} | ({} if index == 5 else {"image": f"{index}.png"}))
    (folder / "data.json").write_text(json.dumps(records))
    return folder, type(case.model)


@pytest.mark.slow
def test_a_family_of_native_resolution_trains_saves_reloads_and_is_reconstructed(family, tmp_path):
    folder, model_class = family
    recipe = load_recipe("qwen3-vl-feedback-lora", tiny_overrides(folder, tmp_path, model__model=folder / "model"))
    recipe.model.lora_r = 0
    recipe.model.learning_rates = {"@tower": 1e-4, "feedback_conditioner": 1e-3}

    final = train(recipe)

    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert sum("feedback_loss" in entry for entry in history) == recipe.training.max_steps
    model, info = model_class.from_pretrained(final, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    before = model_class.from_pretrained(folder / "model").model.visual.state_dict()
    moved = [name for name, value in model.model.visual.state_dict().items() if not value.equal(before[name])]
    assert any("patch_embed" in name for name in moved)
    # Everything that the language model reads of the tower trains: DeepStack's mergers, too.
    assert ("deepstack_merger_list" in str(before.keys())) is any("deepstack_merger_list" in name for name in moved)
    pictures = [folder / "images" / "0.png", folder / "images" / "2.png"]
    reconstruct_files(final, pictures, tmp_path / "seen.png", steps=2)
    assert Image.open(tmp_path / "seen.png").width == 2 * 33 + 1
