"""Chat templates of language models, made to take content parts."""

# Put before a language model's chat template, which knows contents as strings only, to join content parts to strings.
_JOIN_PARTS = """\
{%- set joined = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set content = namespace(text='') -%}
{%- if message['content'] is string -%}
{%- set content.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- set content.text = content.text + (IMAGE if part['type'] == 'image' else part['text']) -%}
{%- endfor -%}
{%- endif -%}
{%- set joined.messages = joined.messages + [dict(message, content=content.text)] -%}
{%- endfor -%}
{%- set messages = joined.messages -%}
"""


def join_parts(chat_template: str, image_token: str) -> str:
    """
    Returns a tokenizer's chat template, which takes contents as strings only, as one that takes content parts; it
    stays as it is if it knows of images. `image_token` and a line break stand for an image in the prompt.
    """
    if "image" in chat_template:
        return chat_template
    return _JOIN_PARTS.replace("IMAGE", repr(image_token + "\n")) + chat_template
