"""A Hugging Face VLM folder, opened up to the few calls that this project makes.

Generator and anchors build their own input embeddings and call the decoder directly: the same code for every
family, no placeholder scatter, no positions guessed by the model, no logits that nobody reads.

Legend: B images, T row length, S keys of a row, D width, V vocabulary, I image tokens.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, Cache
from transformers.utils import cached_file
from transformers.utils.logging import disable_progress_bar

from shared.errors import ModelError
from shared.packing import Media, PackedRows, block_mask
from shared.vlm.families import Family, family_of
from shared.vlm.lean import make_lean
from shared.vlm.prompt import Prompt

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """Embeddings of a batch of images as the language model would read them.

    tokens: per image (I_b, D). grids: per image (rows, columns), None where the family has no grid.
    deepstack: per injected layer the features of all images together (ΣI_b, D); empty for most families.
    per_row: how many of the images, in order, belong to each row; None: every image is a row of its own.
    """

    tokens: list[Tensor]
    grids: list[tuple[int, int] | None]
    deepstack: list[Tensor] = field(default_factory=list)
    per_row: Sequence[int] | None = None

    def in_rows(self, per_row: Sequence[int]) -> ImageTokens:
        """The same images, `per_row[b]` of them in row b."""
        assert sum(per_row) == len(self.tokens), "every image belongs to one row"
        return replace(self, per_row=per_row)

    def picked(self, rows: Sequence[Sequence[int]]) -> ImageTokens:
        """New rows, each of the images with these numbers, which count over all rows."""
        order = [i for row in rows for i in row]
        sizes = [len(t) for t in self.tokens]
        layers = [layer.split(sizes) for layer in self.deepstack]
        return ImageTokens(
            [self.tokens[i] for i in order],
            [self.grids[i] for i in order],
            [torch.cat([layer[i] for i in order]) for layer in layers],
            [len(row) for row in rows],
        )

    def twice(self) -> ImageTokens:
        """Every row's images, and then the same again."""
        return self.picked([2 * list(range(row.start, row.stop)) for row in self.rows])

    @property
    def rows(self) -> list[slice]:
        """Each row's images, as a slice of `tokens` and `grids`."""
        stops = list(itertools.accumulate(self.per_row or [1] * len(self.tokens)))
        return [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]

    @property
    def media(self) -> list[list[Media]]:
        """Where these tokens go in packed rows."""
        media = [Media(len(t), grid) for t, grid in zip(self.tokens, self.grids, strict=True)]
        return [media[row] for row in self.rows]


@dataclass(frozen=True, slots=True)
class Processor:
    """What turns pictures and words into tensors.

    transformers' own processor class wants torchvision for a video part that nothing here uses, so its two
    other parts are loaded one by one.
    """

    tokenizer: Any
    image_processor: Any
    chat_template: str

    def image_inputs(self, family: Family, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """What the family's vision tower takes of images. Thread-safe."""
        batch = [[image] for image in images] if family.nested_images else list(images)
        inputs = self.image_processor(images=batch, return_tensors="pt")
        return {name: inputs[name] for name in family.image_inputs if name in inputs}


class VisionLanguageModel:
    """One model with its processor. Not thread-safe: PEFT adapters and dropout modes are module state."""

    def __init__(self, hf_model: nn.Module, processor: Processor, path: str):
        config: Any = hf_model.config
        self.path = path
        self.hf_model = hf_model
        self.processor = processor
        self.family: Family = family_of(config.model_type, path)
        text_config = config.get_text_config()
        self.width: int = text_config.hidden_size
        # Rows added for latent tokens are no words: an anchor on shared weights must not put probability on them.
        self.vocabulary: int = text_config.vocab_size
        self.inner: Any = hf_model.model
        self.decoder: Any = getattr(self.inner, self.family.decoder)
        make_lean(self.decoder)
        self.dtype: torch.dtype = self._embedding().weight.dtype
        """Of the base weights. Read once: on an adapted embedding, peft builds the whole matrix for `weight`."""
        self.image_token_id: int = config.image_token_id
        image_token = processor.tokenizer.convert_ids_to_tokens(self.image_token_id)
        self.prompt = Prompt(processor.tokenizer, processor.chat_template, self.family, image_token)
        self.prompt_without_image = Prompt(processor.tokenizer, processor.chat_template, self.family, None)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.decoder.parameters()).device
        return device

    def freeze(self) -> VisionLanguageModel:
        """Switch every parameter's gradient off and dropout with it."""
        self.hf_model.requires_grad_(False)
        self.hf_model.eval()
        return self

    def embed(self, token_ids: Tensor) -> Tensor:
        """Embeddings of token ids, (…,) → (…, D)."""
        embedded: Tensor = self._embedding()(token_ids)
        return embedded

    def row_embeddings(self, rows: PackedRows, media_ID: Tensor | None) -> Tensor:
        """(B, T, D) input embeddings of packed rows; media_ID fills the media columns in row order."""
        embeds_BTD = self.embed(rows.token_ids_BT)
        if media_ID is None:
            return embeds_BTD
        return embeds_BTD.masked_scatter(rows.media_BT.unsqueeze(-1), media_ID.to(embeds_BTD.dtype))

    def decode(
        self,
        rows: PackedRows,
        media_ID: Tensor | None,
        deepstack: Sequence[Tensor] = (),
        cache: Cache | None = None,
    ) -> Tensor:
        """(B, T, D) last hidden states, after the final norm, of packed rows.

        deepstack: see `ImageTokens`. cache: keys and values of the rows' cached prefix.
        """
        extra: dict[str, Any] = {"past_key_values": cache}
        if len(deepstack):
            extra |= {"visual_pos_masks": rows.media_BT, "deepstack_visual_embeds": list(deepstack)}
        mask_B1TS = block_mask(rows.segments_BT, rows.n_cached)
        return self.decode_embeddings(self.row_embeddings(rows, media_ID), mask_B1TS, rows.positions_3BT, **extra)

    def decode_embeddings(self, embeds_BTD: Tensor, mask_B1TS: Tensor, positions_3BT: Tensor, **extra: Any) -> Tensor:
        """(B, T, D) last hidden states of embeddings under an explicit boolean mask and explicit positions."""
        # Numbers once: attention would make them of a boolean mask in every layer, and keep each for backward.
        bias_B1TS = torch.zeros_like(mask_B1TS, dtype=embeds_BTD.dtype).masked_fill_(~mask_B1TS, -torch.inf)
        hidden_BTD: Tensor = self.decoder(
            inputs_embeds=embeds_BTD,
            attention_mask=bias_B1TS,
            position_ids=positions_3BT if self.family.uses_mrope else positions_3BT[0],
            use_cache=False,
            **extra,
        ).last_hidden_state
        return hidden_BTD

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight (V, D) and bias (V,) of the output head, without the rows of latent tokens."""
        head: Any = self.hf_model.get_output_embeddings()  # type: ignore[operator]
        # Where head and embedding are one matrix, peft wraps both; new rows are no words, so the bare head serves.
        head = getattr(head, "original_module", head)
        return head.weight[: self.vocabulary], None if head.bias is None else head.bias[: self.vocabulary]

    def image_tokens(self, images: Sequence[Image.Image]) -> ImageTokens:
        """Embeddings of images through the (frozen) vision tower and its projection."""
        return self.image_tokens_from(self.image_inputs(images))

    def image_inputs(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """What the image processor makes of images, for `image_tokens_from`. Needs no GPU; thread-safe."""
        return self.processor.image_inputs(self.family, images)

    def image_tokens_from(self, inputs: dict[str, Tensor]) -> ImageTokens:
        """The same from what `image_inputs` made."""
        device_inputs = {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        features = self.inner.get_image_features(**device_inputs)
        tokens = [t.reshape(-1, t.shape[-1]) for t in features.pooler_output]
        grids: list[tuple[int, int] | None] = [None] * len(tokens)
        if self.family.uses_mrope:
            merge = self.inner.visual.spatial_merge_size
            grids = [(h // merge, w // merge) for _, h, w in inputs["image_grid_thw"].tolist()]
        # Per injected layer, newer transformers split the features by image.
        layers = getattr(features, "deepstack_features", None) or ()
        deepstack = [layer if isinstance(layer, Tensor) else torch.cat(list(layer)) for layer in layers]
        return ImageTokens(tokens, grids, deepstack)

    def _embedding(self) -> Any:
        return self.decoder.get_input_embeddings()


def load_vlm(path: str, dtype: str = "float32", device: str = "cpu") -> VisionLanguageModel:
    """Load a model folder or hub name. Raises ModelError naming what is missing."""
    disable_progress_bar()
    try:
        processor = load_processor(path)
        hf_model = AutoModelForImageTextToText.from_pretrained(path, dtype=DTYPES[dtype], attn_implementation="sdpa")
    except (OSError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"{path}: the model cannot be loaded ({_one_line(error)}); if a file is damaged, copy or download it again"
        ) from error
    return VisionLanguageModel(hf_model.to(device), processor, path)


def vlm_config(path: str) -> Any:
    """The `transformers` config of a model of a known family. Raises ModelError."""
    if path.count("/") != 1 and not Path(path).is_dir():
        raise ModelError(f"{path}: no such model folder; correct the path (toy models lie in trainer/toy/models)")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: no model config ({_one_line(error)})") from error
    family_of(config.model_type, path)
    return config


def load_processor(path: str) -> Processor:
    """Tokenizer, image processor and chat template of a model. Raises ModelError if one is missing."""
    options = dict(family_of(vlm_config(path).model_type, path).processor_options)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        image_processor = AutoImageProcessor.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: no processor ({_one_line(error)}); save the original model's into the folder: "
            "AutoProcessor.from_pretrained(ORIGINAL).save_pretrained(FOLDER)"
        ) from error
    return Processor(tokenizer, image_processor, _chat_template(path, tokenizer))


def load_prompt(path: str) -> Prompt:
    """The prompt of a model without its weights: enough to check data before any weight is loaded."""
    config, processor = vlm_config(path), load_processor(path)
    image_token = processor.tokenizer.convert_ids_to_tokens(config.image_token_id)
    return Prompt(processor.tokenizer, processor.chat_template, family_of(config.model_type, path), image_token)


def _chat_template(path: str, tokenizer: Any) -> str:
    """The processor's template (which knows images) before the tokenizer's."""
    for name in ("chat_template.jinja", "chat_template.json"):
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            text = Path(file).read_text()
            return text if name.endswith("jinja") else str(json.loads(text)["chat_template"])
    if not tokenizer.chat_template:
        raise ModelError(f"{path}: no chat template; add chat_template.jinja to the model folder")
    return str(tokenizer.chat_template)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
