"""How each family writes an image in a prompt: its tokens, and what takes the place of a template that has none."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A family's image tokens.

    `written`: what its chat templates put for an image, each template one of them; `expanded`: what that stands for,
    with `token` once, which is then repeated for every feature; `start`: the bracket before; `video`: a video's
    placeholder.
    """

    name: str
    written: tuple[str, ...]
    expanded: str
    token: str
    start: str
    video: str


QWEN = Family(
    name="Qwen2.5-VL",
    written=("<|image_pad|>",),
    expanded="<|image_pad|>",
    token="<|image_pad|>",
    start="<|vision_start|>",
    video="<|video_pad|>",
)
INTERNVL = Family(
    name="InternVL",
    written=("<IMG_CONTEXT>", "<image>"),
    expanded="<img><IMG_CONTEXT></img>",
    token="<IMG_CONTEXT>",
    start="<img>",
    video="<video>",
)
# The names under which transformers' InternVLProcessor asks the tokenizer for its tokens.
INTERNVL_TOKEN_NAMES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}

OPENGVLAB_SYSTEM = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
# What OpenGVLab's own code makes of a conversation (`internvl2_5` in the conversation.py of its checkpoints), for those
# whose template writes text alone. An image that begins a turn is followed by a line break; others stand in the text.
OPENGVLAB_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\n" + OPENGVLAB_SYSTEM + "<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}{%- else %}"
    "{%- set turn = namespace(begun=false) %}"
    "{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{- '<IMG_CONTEXT>' }}"
    "{%- set after = loop.nextitem['text'] if loop.nextitem and loop.nextitem['type'] == 'text' else '' %}"
    "{%- if not turn.begun and not after.startswith('\\n') %}{{- '\\n' }}{%- endif %}"
    "{%- elif part['type'] == 'text' %}{{- part['text'] }}{%- set turn.begun = true %}{%- endif %}"
    "{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
