"""Sampled answers of a base model with vLLM, which serves the whole vision-language model, images and all.

vLLM lives in an environment of its own and is imported when an engine is made. It reads this project's own prompts as
token ids, with one image token for every image, in whose place it puts as many as the image has. Same probabilities as
with transformers, other random numbers: an engine's labels are not the other's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from PIL import Image

from shared.config import Dtype
from shared.errors import ConfigError, ModelError
from shared.vlm import Prompt, load_prompt, vlm_config
from shared.vlm.families import family_of
from trainer.data.records import Record
from trainer.difficulty.engine import Engine, SamplingConfig, distinct, label_line, load_shown, sample_seed

_GPU_MEMORY, _CPU_MEMORY = 0.9, 0.25
"""Shares of memory that vLLM takes; on the CPU keys and values have VLLM_CPU_KVCACHE_SPACE."""


def vllm_engine(path: str, dtype: Dtype, gpus: float, sampling: SamplingConfig) -> Engine:
    """An engine with a model of its own (see `check_family`), on a share of a GPU or the CPU. Raises ModelError."""
    try:
        from vllm import LLM
    except ImportError as error:
        raise ModelError(
            f"{sys.executable}: no vLLM to import ({error}); give --vllm the interpreter of an environment that holds "
            "vLLM and this project"
        ) from error
    try:
        llm = LLM(
            model=path,
            dtype=dtype,
            max_num_seqs=sampling.rows,
            gpu_memory_utilization=_GPU_MEMORY * min(gpus, 1.0) if gpus else _CPU_MEMORY,
            enforce_eager=gpus == 0,
            disable_log_stats=True,
        )
    except Exception as error:  # vLLM raises whatever its processes met
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{path}: vLLM cannot load it ({reason}; its log says more); leave --vllm out") from error
    prompt, image_token_id = load_prompt(path), int(vlm_config(path).image_token_id)
    return lambda records: sample_answers(llm, prompt, image_token_id, records, sampling)


def check_family(path: str) -> None:
    """Refuse a model whose images vLLM prepares in another way than this project. Raises ConfigError."""
    family = family_of(vlm_config(path).model_type, path)
    if family.processor_options or family.before_image:
        raise ConfigError(
            f"{path}: vLLM cuts images of {family.name} into tiles, which this project does not; leave --vllm out"
        )


def sample_answers(
    llm: Any, prompt: Prompt, image_token_id: int, records: Sequence[Record], sampling: SamplingConfig
) -> list[dict[str, Any]]:
    """Label lines of records; vLLM decides what is computed at a time."""
    from vllm import SamplingParams

    shown, lines = load_shown(records)
    asked = [(record, images, question) for record, images in shown for question in distinct(record)]
    branches = [branch for (branch,) in prompt.branches([[question.message] for _, _, question in asked])]
    requests, settings = [], []
    for (record, images, question), branch in zip(asked, branches, strict=True):
        opening = branch.token_ids[: branch.answer_start]
        requests.append(_request(prompt, image_token_id, images, opening))
        settings.append(
            SamplingParams(
                n=sampling.samples,
                temperature=sampling.temperature,
                seed=sample_seed(sampling.seed, record.record_id, question.text) % 2**62,
                max_tokens=sampling.max_tokens + 1,  # the end of turn
                stop_token_ids=[branch.token_ids[-1]],
                ignore_eos=True,
                detokenize=False,
            )
        )
    for (record, _, question), branch, output in zip(
        asked, branches, llm.generate(requests, settings, use_tqdm=False), strict=True
    ):
        sampled = [_without_end(list(one.token_ids), branch.token_ids[-1]) for one in output.outputs]
        lines.append(label_line(prompt.tokenizer, record, question, branch, sampled))
    return lines


def _request(
    prompt: Prompt, image_token_id: int, images: Sequence[Image.Image], opening: Sequence[int]
) -> dict[str, Any]:
    """What vLLM reads: the prompt up to where the answer begins, and its images."""
    token_ids = list(prompt.prefix_ids)
    for i in range(len(images)):
        token_ids += [*(prompt.between_images_ids if i else []), image_token_id]
    return {"prompt_token_ids": [*token_ids, *opening], "multi_modal_data": {"image": list(images)}}


def _without_end(token_ids: list[int], end_id: int) -> tuple[list[int], bool]:
    """An answer's tokens, and whether it ended its turn."""
    return (token_ids[:-1], True) if token_ids[-1:] == [end_id] else (token_ids, False)
