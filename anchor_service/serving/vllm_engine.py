"""The same jobs on vLLM: an exported language model fed by prompt embeddings, with latents where image tokens stood.

vLLM lives in an environment of its own and is imported when an engine is made. It serves the language model alone
(`python -m anchor_service export`). Scoring stays with `Engine`'s model: vLLM 0.32 gives no log-probabilities of a
prompt of embeddings (it answers `[None]`).

Legend: T tokens of a prompt, K latents, D width, V vocabulary.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from anchor_service.serving.engine import EndEvent, Event, Job, TokenEvent
from anchor_service.serving.sampling import AnswerText
from shared.errors import ModelError
from shared.vlm import load_prompt
from shared.vlm.model import DTYPES

_EMBEDDING = "model.embed_tokens.weight"
_TOP_LOGPROBS = 20


class VllmEngine:
    """Owned by one event loop.

    model: folder of the anchor, for its prompt. exported: its language model. n_rows: answers at work at one time.
    memory_share: of the GPU, for weights and keys and values (on a CPU see VLLM_CPU_KVCACHE_SPACE).
    """

    def __init__(self, model: str, exported: Path, dtype: str, n_rows: int, memory_share: float):
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._prompt = load_prompt(model)
        self._embedding_VD = _embedding(exported).to(DTYPES[dtype])
        self._numbers = itertools.count()
        arguments = AsyncEngineArgs(
            model=str(exported),
            dtype=dtype,
            enable_prompt_embeds=True,
            enforce_eager=not torch.cuda.is_available(),
            max_num_seqs=n_rows,
            max_logprobs=_TOP_LOGPROBS,
            gpu_memory_utilization=memory_share,
            disable_log_stats=True,
        )
        self._engine = AsyncLLM.from_engine_args(arguments)

    async def generate(self, job: Job) -> AsyncGenerator[list[Event], None]:
        """Events of a job as they come. Whoever stops listening cancels the job."""
        arrived: asyncio.Queue[list[Event] | BaseException] = asyncio.Queue()
        prompt_TD, end_id = self._prompt_embeddings(job)
        samples = [
            asyncio.create_task(self._write(job, sample, prompt_TD, end_id, arrived))
            for sample in range(job.sampling.n)
        ]
        n_open = len(samples)
        try:
            while n_open:
                events = await arrived.get()
                if isinstance(events, BaseException):
                    raise events
                n_open -= sum(isinstance(event, EndEvent) for event in events)
                yield events
        finally:
            for task in samples:
                task.cancel()
            await asyncio.gather(*samples, return_exceptions=True)

    @property
    def at_work(self) -> int:
        """Answers that vLLM is writing."""
        return int(self._engine.output_processor.get_num_unfinished_requests())

    def close(self) -> None:
        """End vLLM's processes."""
        self._engine.shutdown()

    async def _write(
        self,
        job: Job,
        sample: int,
        prompt_TD: Tensor,
        end_id: int,
        arrived: asyncio.Queue[list[Event] | BaseException],
    ) -> None:
        """One answer, its events put into a queue; cancelling it aborts vLLM's request."""
        try:
            async with aclosing(self._events(job, sample, prompt_TD, end_id)) as written:
                async for events in written:
                    arrived.put_nowait(events)
        except Exception as error:  # noqa: BLE001 - whoever listens raises it
            arrived.put_nowait(error)

    async def _events(self, job: Job, sample: int, prompt_TD: Tensor, end_id: int) -> AsyncGenerator[list[Event], None]:
        text = AnswerText(self._prompt.tokenizer, job.sampling.stop)
        n_written = 0
        request = self._engine.generate(
            {"prompt_embeds": prompt_TD}, self._sampling(job, sample, end_id), f"{next(self._numbers)}"
        )
        async with aclosing(request):
            async for output in request:
                (written,) = output.outputs
                for token, logprobs in zip(written.token_ids, written.logprobs, strict=True):
                    if token == end_id:
                        yield [EndEvent(sample, text.end(), "stop", len(prompt_TD), n_written)]
                        return
                    n_written += 1
                    new = text.add(token)
                    if text.stopped:
                        yield [EndEvent(sample, new, "stop", len(prompt_TD), n_written)]
                        return
                    yield [self._token_event(job, sample, token, new, logprobs)]
        yield [EndEvent(sample, text.end(), "length", len(prompt_TD), n_written)]

    def _sampling(self, job: Job, sample: int, end_id: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        asked = job.sampling
        return SamplingParams(
            temperature=asked.temperature,
            top_p=asked.top_p,
            seed=(asked.seed + sample) % 2**63,
            max_tokens=asked.max_tokens,
            stop_token_ids=[end_id],
            ignore_eos=True,
            logprobs=asked.top_logprobs,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    def _token_event(self, job: Job, sample: int, token: int, text: str, logprobs: Any) -> TokenEvent:
        """VLLM gives the token that was drawn beside the most probable ones, in the order of their rank."""
        ranked = sorted(logprobs.items(), key=lambda item: item[1].rank)[: job.sampling.top_logprobs]
        top = tuple((self._token_text(i), float(entry.logprob)) for i, entry in ranked)
        return TokenEvent(sample, text, self._token_text(token), float(logprobs[token].logprob), top)

    def _token_text(self, token: int) -> str:
        return str(self._prompt.tokenizer.decode([token]))

    def _prompt_embeddings(self, job: Job) -> tuple[Tensor, int]:
        """(T, D) embeddings of a question about latents, and the token that ends the answer."""
        token_ids, end_id = self._prompt.opening(job.question)
        latents_KD = torch.as_tensor(job.latents_KD).to(self._embedding_VD.dtype)
        parts = [self._embed(self._prompt.prefix_ids), latents_KD, self._embed(token_ids)]
        return torch.cat(parts), end_id

    def _embed(self, token_ids: Sequence[int]) -> Tensor:
        return self._embedding_VD[torch.tensor(token_ids)]


def _embedding(exported: Path) -> Tensor:
    """(V, D) input embeddings of an exported checkpoint. Raises ModelError if it has none."""
    for file in sorted(exported.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                if _EMBEDDING in tensors.keys():  # noqa: SIM118
                    weight: Tensor = tensors.get_tensor(_EMBEDDING)
                    return weight
        except SafetensorError as error:
            raise ModelError(f"{file}: damaged ({error}); export the anchor again") from error
    raise ModelError(f"{exported}: no {_EMBEDDING}; make the folder with `python -m anchor_service export`")
