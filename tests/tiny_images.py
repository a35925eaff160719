"""Tiny random models that see images, whole: a vision tower, a language model, a tokenizer and a processor. float32."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from tests.tiny_gemma import tiny_gemma_config
from tests.tiny_llama import VOCAB_SIZE, random_prompt, tiny_llama_config
from tests.tiny_tokenizer import build_tiny_tokenizer

IMAGE, BEGIN, END = VOCAB_SIZE, VOCAB_SIZE + 1, VOCAB_SIZE + 2  # tokens behind those of the text
IMAGE_LEN = 36  # tokens of an image
VOCAB = VOCAB_SIZE + 64
_PIXELS, _PATCH = 84, 14
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": _PATCH,
    "projection_dim": 64,
}
# how published checkpoints, and vLLM, call what transformers calls "vision_tower.encoder"
_PUBLISHED = re.compile(r"(vision_tower\.)(?!vision_model\.)(.*)")
_SIZE = {"height": _PIXELS, "width": _PIXELS}


def picture(seed: int) -> Image.Image:
    """Return an image of noise, coarse enough for its patches to differ."""
    pixels = torch.randint(0, 256, (6, 6, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((_PIXELS, _PIXELS), Image.Resampling.NEAREST)


def illustrated(*parts: int | Image.Image, seed: int, placeholder: int) -> dict[str, Any]:
    """Return a prompt as vLLM takes it: so many tokens of text, or an image, for each part.

    placeholder: token that stands for an image
    """
    tokens: list[int] = []
    for place, part in enumerate(parts):
        tokens += random_prompt(part, seed=seed + place) if isinstance(part, int) else [placeholder]
    images = [part for part in parts if not isinstance(part, int)]
    return {"prompt_token_ids": tokens} | ({"multi_modal_data": {"image": images}} if images else {})


def build_tiny_llava(folder: Path) -> Path:
    """Save a LLaVA, whose images are read like text, and return its folder."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION, image_size=_PIXELS),
        text_config=_with_images(tiny_llama_config()),
        image_token_index=IMAGE,
        image_seq_length=IMAGE_LEN,
        vision_feature_layer=-1,
        dtype="float32",
    )
    _save(LlavaForConditionalGeneration(config), folder)
    pixels = CLIPImageProcessorPil(size={"shortest_edge": _PIXELS}, crop_size=_SIZE)
    processor = LlavaProcessor(
        pixels,
        _tokenizer(folder),
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    return folder


def build_tiny_gemma3(folder: Path) -> Path:
    """Save a Gemma 3, whose images see all of themselves, and return its folder. Every other layer has a window."""
    torch.manual_seed(0)
    config = Gemma3Config(
        text_config=tiny_gemma_config(["sliding_attention", "full_attention"] * 2, vocab_size=VOCAB),
        vision_config=SiglipVisionConfig(**_VISION, image_size=_PIXELS),
        mm_tokens_per_image=IMAGE_LEN,
        image_token_index=IMAGE,
        boi_token_index=BEGIN,
        eoi_token_index=END,
        dtype="float32",
    )
    _save(Gemma3ForConditionalGeneration(config), folder)
    pixels = Gemma3ImageProcessorPil(size=_SIZE, do_pan_and_scan=False)
    Gemma3Processor(pixels, _tokenizer(folder), image_seq_length=IMAGE_LEN).save_pretrained(folder)
    return folder


def _with_images(config: Any) -> Any:
    config.vocab_size = VOCAB
    return config


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    special = {"image_token": "<image>", "boi_token": "<begin>", "eoi_token": "<end>"}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(build_tiny_tokenizer(folder), extra_special_tokens=special)
    tokenizer.add_tokens(["\n" * count for count in (1, 2, 3, 4)])  # of Gemma, around its images
    assert tokenizer.convert_tokens_to_ids([*special.values()]) == [IMAGE, BEGIN, END]
    return tokenizer


def _save(model: Any, folder: Path) -> None:
    """Make attention sharp enough for scores to differ, and images as loud as text."""
    model = model.float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "vision_tower" in name:
                continue
            if "q_norm" in name or "k_norm" in name:
                weight.fill_(1.5)  # Gemma scales by 1 + weight
            elif "q_proj" in name or "k_proj" in name:
                weight.mul_(6.0)
            elif "embed_tokens" in name or "lm_head" in name:
                weight.mul_(4.0)
            elif "projector" in name and weight.dim() >= 2:
                weight.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    weights = {_PUBLISHED.sub(r"\1vision_model.\2", name): weight for name, weight in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
