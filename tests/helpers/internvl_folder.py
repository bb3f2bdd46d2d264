"""A small HF folder with the tokenizer, chat template and image settings of InternVL3, in each layout it comes in."""

import json
import re
from pathlib import Path

from helpers.tokenizer_folder import build_tokenizer_folder
from tokenizers import AddedToken, Tokenizer
from transformers import InternVLProcessor
from transformers.processing_utils import ProcessorMixin

# In the order of the released vocabularies; <video> is in those of the -hf layout only.
TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
NAMES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

HF_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}"
    "{% if part.type == 'image' %}{{ '<IMG_CONTEXT>\\n' }}"
    "{% elif part.type == 'video' %}{{ '<video>\\n' }}"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build_internvl_folder(
    folder: str | Path, *, layout: str = "hf", tile_size: int = 56, min_patches: int = 1, max_patches: int = 6
) -> Path:
    """Writes the folder and returns it.

    `layout`: "hf"; "old_hf", whose template writes `<image>`; "opengvlab", with a template for text alone.
    """
    folder = build_tokenizer_folder(folder, vision=False)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = TOKENS if layout == "opengvlab" else (*TOKENS, "<video>")
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = _read(folder / "tokenizer_config.json")
    for token in special:
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        config["added_tokens_decoder"][str(tokenizer.token_to_id(token))] = {"content": token, **flags}
    sides = tile_size // 28
    if layout == "opengvlab":
        _write(folder / "tokenizer_config.json", config)
        tower = {"image_size": tile_size, "patch_size": 14}
        model = {"model_type": "internvl_chat", "template": "internvl2_5", "downsample_ratio": 0.5}
        model |= {"force_image_size": tile_size, "vision_config": tower, "use_thumbnail": True}
        model |= {"dynamic_image_size": True, "min_dynamic_patch": min_patches, "max_dynamic_patch": max_patches}
        model["auto_map"] = {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}
        _write(folder / "config.json", model)
        clip = {"feature_extractor_type": "CLIPFeatureExtractor", "crop_size": 224, "size": 224, "resample": 3}
        clip |= {"do_center_crop": True, "do_resize": True, "do_normalize": True, "image_mean": MEAN, "image_std": STD}
        _write(folder / "preprocessor_config.json", clip)
        return folder
    config["chat_template"] = HF_TEMPLATE
    if layout == "old_hf":
        config["chat_template"] = HF_TEMPLATE.replace("<IMG_CONTEXT>", "<image>")
    config |= NAMES
    _write(folder / "tokenizer_config.json", config)
    _write(folder / "preprocessor_config.json", processor_config(tile_size, min_patches, max_patches))
    _write(folder / "processor_config.json", {"processor_class": "InternVLProcessor", "image_seq_length": sides**2})
    return folder


def processor_config(tile_size: int = 448, min_patches: int = 1, max_patches: int = 12) -> dict:
    """What the released -hf folders have in preprocessor_config.json, nulls and all."""
    return {
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "processor_class": "InternVLProcessor",
        "crop_to_patches": False,
        "crop_size": None,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": MEAN,
        "image_std": STD,
        "max_patches": max_patches,
        "min_patches": min_patches,
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "return_tensors": None,
        "size": {"height": tile_size, "width": tile_size},
    }


class Reference(InternVLProcessor):
    """transformers' InternVLProcessor without its video half, which needs torchvision."""

    def __init__(self, image_processor, tokenizer, image_seq_length):
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=tokenizer.chat_template)
        self.image_seq_length = image_seq_length
        self.start_image_token, self.end_image_token = tokenizer.start_image_token, tokenizer.end_image_token
        self.start_image_token_id = tokenizer.start_image_token_id
        self.end_image_token_id = tokenizer.end_image_token_id
        self.image_token, self.image_token_id = tokenizer.context_image_token, tokenizer.context_image_token_id
        self.video_token = tokenizer.video_token
        self.multimodal_pattern = re.compile(f"(?P<image>{re.escape(self.image_token)})|(?P<video><video>)")

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
