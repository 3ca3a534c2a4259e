"""The generator: a VLM with a LoRA adapter that looks at an image once and writes K latents.

Its row holds no question, so the latents must serve every question about the image:

    prompt before the image | image tokens | after the image, latent_start, K latent tokens

(of a record with several images, all of them, with the template's own tokens between two).

h is the last hidden state (after the final norm) at the K latent positions, from one parallel pass, times a
constant that gives it the mean length of the anchors' own visual tokens before training starts: the final norm
fixes the length of hidden states, and anchors read latents of another length much worse. Nothing after the latents
is computed: attention is causal, so it could not change them. No logits are made.

Legend: B records, T row length, K latents, D width, I image tokens of all images together.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Cache

from shared.config import GeneratorConfig
from shared.errors import CheckpointError
from shared.messages import PROTOCOL_VERSION, Handshake
from shared.packing import Branch, PackedRows, block_mask, pack_rows
from shared.vlm.model import ImageTokens, load_vlm

_SCALE_FILE = "latents.json"
LATENT_START, LATENT_END = "<|latent_start|>", "<|latent_end|>"


class Generator:
    """Owns the base model, its adapter and the latent tokens. `parameters` are all that training changes."""

    def __init__(self, config: GeneratorConfig, seed: int):
        self.config = config
        if config.cpus is not None:
            torch.set_num_threads(config.cpus)
        self.model = load_vlm(config.model, config.dtype, resolve_device(config.device)).freeze()
        self.n_latents = config.latents
        self.output_scale = 1.0
        self.token_ids, new_rows = self._add_latent_tokens(seed)
        torch.manual_seed(seed)
        adapter = PeftLoraConfig(
            r=config.lora.rank,
            lora_alpha=config.lora.alpha,
            lora_dropout=config.lora.dropout,
            target_modules=lora_target_pattern(self.model.family.decoder, config.lora.targets),
            trainable_token_indices={"embed_tokens": self.token_ids[:-1]},
        )
        with warnings.catch_warnings():
            # peft 0.21 asks transformers 5.23 by a name that is going away.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
            self.peft_model: Any = get_peft_model(self.model.hf_model, adapter)
        for parameter in self.parameters():
            parameter.data = parameter.data.float()
        self._token_rows().data.copy_(new_rows[:-1])
        if config.gradient_checkpointing:
            self.model.decoder.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def lora_parameters(self) -> list[nn.Parameter]:
        """LoRA matrices, float32."""
        return [p for name, p in self.peft_model.named_parameters() if p.requires_grad and "lora_" in name]

    @property
    def token_parameters(self) -> list[nn.Parameter]:
        """Embedding rows of latent_start and the K slots, (1 + K, D), float32."""
        return [self._token_rows()]

    def parameters(self) -> list[nn.Parameter]:
        """Everything that training changes on the base model's side."""
        return [*self.lora_parameters, *self.token_parameters]

    def train(self, mode: bool = True) -> None:
        """Switch LoRA dropout on or off."""
        self.peft_model.train(mode)

    def adapter_off(self) -> contextlib.AbstractContextManager[Any]:
        """The base model as it was, latent token rows included, in evaluation mode, while the context lasts."""
        return _AdapterOff(self.peft_model)

    def image_tokens_from(self, inputs: dict[str, Tensor]) -> ImageTokens:
        """Visual tokens from the image processor's tensors; the tower is frozen, so no graph is kept."""
        with torch.no_grad():
            return self.model.image_tokens_from(inputs)

    def emit(self, tokens: ImageTokens) -> Tensor:
        """Latents (B, K, D) of each row's images, in the dtype of the base weights; differentiable, in tokens too."""
        prompt, media = self.model.prompt, tokens.media
        branch = Branch((*prompt.after_image_ids, *self.token_ids), len(prompt.after_image_ids) + 2)
        rows = pack_rows(prompt.prefix_ids, media, [[branch]] * len(media), prompt.between_images_ids)
        rows = rows.to(self.model.device)
        hidden_BTD = self.hidden_states(rows, tokens, block_mask(rows.segments_BT))
        latents_ND = hidden_BTD[rows.predict_N2[:, 0], rows.predict_N2[:, 1]]
        latents_BKD: Tensor = (self.output_scale * latents_ND).unflatten(0, (-1, self.n_latents))
        return latents_BKD.to(self.model.dtype)

    def hidden_states(
        self,
        rows: PackedRows,
        tokens: ImageTokens,
        mask_B1TS: Tensor,
        cache: Cache | None = None,
        inputs_ND: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) last hidden states of rows that may hold latent tokens, under an explicit mask.

        cache: receives keys and values, or gives those that stand before the rows' columns. inputs_ND: what is read at
        the K slots' columns, row by row, in order, instead of the slots' own embeddings.
        """
        start = self.token_ids[0]
        is_new_BT = (rows.token_ids_BT >= start) & (rows.token_ids_BT < start + 1 + self.n_latents)
        # The new rows are put in here instead of by the wrapped embedding, which would copy the whole matrix.
        base_ids_BT = rows.token_ids_BT.masked_fill(is_new_BT, 0)
        with torch.no_grad():
            embeds_BTD = self._embedding().token_adapter.base_layer(base_ids_BT)
        if tokens.tokens:
            media_ID = torch.cat(tokens.tokens).to(embeds_BTD.dtype)
            embeds_BTD = embeds_BTD.masked_scatter(rows.media_BT.unsqueeze(-1), media_ID)
        new_BTD = self._token_rows()[(rows.token_ids_BT - start).clamp(0, self.n_latents)].to(embeds_BTD.dtype)
        embeds_BTD = torch.where(is_new_BT.unsqueeze(-1), new_BTD, embeds_BTD)
        if inputs_ND is not None:
            is_slot_BT1 = (is_new_BT & (rows.token_ids_BT > start)).unsqueeze(-1)
            embeds_BTD = embeds_BTD.masked_scatter(is_slot_BT1, inputs_ND.to(embeds_BTD.dtype))
        extra: dict[str, Any] = {"past_key_values": cache}
        if tokens.deepstack:
            extra |= {"visual_pos_masks": rows.media_BT, "deepstack_visual_embeds": tokens.deepstack}
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            return self.model.decode_embeddings(embeds_BTD, mask_B1TS, rows.positions_3BT, **extra)

    @torch.no_grad()
    def calibrate_norm(self, tokens: ImageTokens, target_norm: float) -> None:
        """Set the output scale so that the mean ‖h_k‖ of these images is `target_norm`. Before training only."""
        self.train(False)
        self.output_scale = 1.0
        latents_BKD = self.emit(tokens)
        self.output_scale = target_norm / float(latents_BKD.float().norm(dim=-1).mean())

    def handshake(self) -> Handshake:
        """The generator's side of the comparison with every anchor."""
        return Handshake(
            name=self.model.path,
            protocol=PROTOCOL_VERSION,
            latents=self.n_latents,
            width=self.model.width,
            dtype=self.config.dtype,
            family=self.model.family.name,
            prompt=self.model.prompt.digest,
        )

    def save_adapter(self, folder: Path) -> None:
        """Write a PEFT adapter folder with the extended tokenizer and the output scale."""
        self.peft_model.save_pretrained(folder, save_embedding_layers=False)
        (folder / _SCALE_FILE).write_text(json.dumps({"output_scale": self.output_scale}) + "\n", encoding="utf-8")
        self.model.processor.tokenizer.save_pretrained(folder)

    def load_adapter(self, folder: Path) -> None:
        """Read weights that `save_adapter` wrote. Raises CheckpointError if they do not fit."""
        self.output_scale = float(json.loads((folder / _SCALE_FILE).read_text(encoding="utf-8"))["output_scale"])
        state = load_file(str(folder / "adapter_model.safetensors"), device=str(self.model.device))
        try:
            result = set_peft_model_state_dict(self.peft_model, state)
        except RuntimeError as error:
            raise CheckpointError(
                f"{folder}: the adapter does not fit the config (rank or latents changed?): "
                f"{' '.join(str(error).split())[:200]}"
            ) from error
        if result.unexpected_keys:
            raise CheckpointError(
                f"{folder}: the adapter has weights that this config lacks: {result.unexpected_keys[:3]}"
            )

    def _add_latent_tokens(self, seed: int) -> tuple[list[int], Tensor]:
        """Ids of latent_start, K slots, latent_end, and a row for each: noise of the matrix's own spread.

        The rows are for the adapter alone: where head and embedding are one matrix, writing them into it would
        change the base model's logits.
        """
        tokenizer = self.model.processor.tokenizer
        names = [LATENT_START, *(f"<|latent_{k}|>" for k in range(self.n_latents)), LATENT_END]
        first = len(tokenizer)
        tokenizer.add_tokens(names, special_tokens=True)
        ids = [int(i) for i in tokenizer.convert_tokens_to_ids(names)]
        assert ids == list(range(first, first + len(names))), "latent tokens must be new and consecutive"
        if ids[-1] >= self._embedding().weight.shape[0]:
            # Resizing would also grow the head; anchors on shared weights never look at those rows.
            self.model.hf_model.resize_token_embeddings(ids[-1] + 1, mean_resizing=False)  # type: ignore[operator]
            self.model.hf_model.requires_grad_(False)
        std = float(self._embedding().weight[:first].float().std())
        noise = torch.randn(len(ids), self.model.width, generator=torch.Generator().manual_seed(seed)) * std
        return ids, noise

    def _embedding(self) -> Any:
        return self.model.decoder.get_input_embeddings()

    def _token_rows(self) -> nn.Parameter:
        rows: nn.Parameter = self._embedding().token_adapter.trainable_tokens_delta["default"]
        return rows


class _AdapterOff(contextlib.AbstractContextManager[None]):
    """Adapter disabled and dropout off; the mode before is restored. Reusable, not reentrant."""

    def __init__(self, peft_model: Any):
        self._peft_model = peft_model
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> None:
        was_training = self._peft_model.training
        self._stack.enter_context(self._peft_model.disable_adapter())
        self._peft_model.eval()
        self._stack.callback(self._peft_model.train, was_training)

    def __exit__(self, *details: Any) -> None:
        self._stack.__exit__(*details)


def lora_target_pattern(decoder: str, targets: Sequence[str]) -> str:
    """Matches the names of the linear layers that get LoRA: those of the language model, not of the vision tower."""
    return rf".*\.{decoder}\..*\.({'|'.join(targets)})"


def resolve_device(device: str) -> str:
    """auto: the first GPU if there is one, else the CPU."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"
