import shutil

import pytest
from transformers import AutoProcessor

from deem_plugin.data.chat import render_chat
from deem_plugin.training.arguments import ModelArguments
from deem_plugin.training.encoder import load_encoder
from deem_plugin.training.model import make_model

from ..tiny import tiny_full_clip, tiny_llama, tiny_tokenizer

# A language model's template: it knows contents as strings only.
STRING_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}[sys]{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def assembled(tmp_path):
    """A LLaVA assembled of a Llama whose template knows strings only, and its processor."""
    tiny_llama(tmp_path / "llama")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = STRING_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "llama")
    tiny_full_clip(tmp_path / "clip")
    arguments = ModelArguments(
        language_model=str(tmp_path / "llama"), vision_tower=f"deem:{tmp_path / 'clip'}", num_queries=0
    )
    return make_model(arguments)


def test_an_assembled_model_renders_images_before_and_after_saving(assembled, tmp_path):
    _, processor = assembled
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "It"}]
    expected = "[sys]<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\nIt<|im_end|>\n"
    processor.save_pretrained(tmp_path / "saved")

    assert render_chat(processor, messages) == expected
    assert render_chat(AutoProcessor.from_pretrained(tmp_path / "saved"), messages) == expected
    prompt = render_chat(processor, messages[:1], add_generation_prompt=True)
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_missing_chat_template_file_is_an_error(assembled, tmp_path):
    arguments = ModelArguments(
        language_model=str(tmp_path / "llama"),
        vision_tower=f"deem:{tmp_path / 'clip'}",
        chat_template="nowhere.jinja",
    )
    with pytest.raises(ValueError, match="chat template nowhere.jinja does not exist. Set `model.chat_template`"):
        make_model(arguments)


def test_the_shipped_vicuna_template_is_vicunas_format(assembled):
    from deem_plugin.resources import recipes_dir

    _, processor = assembled
    processor.chat_template = (recipes_dir() / "vicuna_v1.jinja").read_text()
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "It"}]},
        {"role": "user", "content": "Sure?"},
    ]

    text = render_chat(processor, messages, add_generation_prompt=True)

    # LLaVA-1.5's "v1" conversation: blanks between turns, the end-of-sequence token behind each answer.
    assert text == (
        "<s>A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions. USER: <image>\nWhat? ASSISTANT: It<|im_end|>USER: "
        "Sure? ASSISTANT:"
    )


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_checkpoint_that_cannot_be_loaded_is_named_with_its_setting(parts, tmp_path, damage):
    folder = tmp_path / "llava"
    if damage == "truncated":
        shutil.copytree(parts / "llava", folder)
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])

    with pytest.raises(ValueError, match=f"`model.model: {folder}` cannot be loaded .* Expected a folder"):
        make_model(ModelArguments(model=str(folder)))
    with pytest.raises(ValueError, match=f"`model.encoder: {folder}/nowhere` cannot be loaded"):
        load_encoder(ModelArguments(encoder=f"{folder}/nowhere"))
