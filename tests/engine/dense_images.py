"""The model that sees images in plain transformers, with evicted tokens masked: what the engine must compute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageTextToText

from tests.tiny_images import IMAGE
from vllm_kvevict.engine.offline.check.dense import DenseModel


class DenseImages(DenseModel):
    """The language model reads embeddings: of text, and of images what the vision tower makes of them.

    sees_itself: whether each token of an image sees all of the image
    """

    def __init__(self, folder: Path, sees_itself: bool) -> None:
        self._whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self._pixels = AutoImageProcessor.from_pretrained(folder, backend="pil")
        text = AutoModelForCausalLM.from_config(self._whole.config.text_config)
        text.model.load_state_dict(self._whole.model.language_model.state_dict())
        text.lm_head.load_state_dict(self._whole.lm_head.state_dict())
        text.save_pretrained(folder / "text")
        super().__init__(folder / "text")
        self.sees_itself = sees_itself
        self._embeddings = self._images = torch.empty(0)

    @torch.inference_mode()
    def show(self, images: Sequence[Image.Image]) -> None:
        """From now on a prompt has these images."""
        pixels = self._pixels(images=list(images), return_tensors="pt")["pixel_values"]
        found = self._whole.model.get_image_features(pixels).pooler_output
        self._images = torch.cat([*found]).flatten(0, -2)

    def _logits(self, tokens: list[int]) -> torch.Tensor:
        self.queries, self.keys, self._kept_of = [], [], {}
        numbers = torch.tensor(tokens)
        is_image = self._is_image = numbers == IMAGE
        embedded = self.model.get_input_embeddings()(numbers.masked_fill(is_image, 0))
        embedded[is_image] = self._images
        return self.model(inputs_embeds=embedded[None], use_cache=False).logits[0]

    def _seen(self, module: Any, mask: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
        visible = super()._seen(module, mask, num_kv_heads)
        if not self.sees_itself:
            return visible
        # between two images there is text
        numbers = (self._is_image & ~self._is_image.roll(1)).cumsum(0) * self._is_image
        return visible | ((numbers[:, None] == numbers) & self._is_image)
