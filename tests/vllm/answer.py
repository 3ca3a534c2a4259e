"""Run in vLLM's environment: jobs from a folder answered by `VllmEngine`, their events written beside them.

.venv-vllm/bin/python -m tests.vllm.answer MODEL EXPORTED FOLDER
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from anchor_service.serving.engine import Job
from anchor_service.serving.sampling import Sampling
from anchor_service.serving.vllm_engine import VllmEngine


async def events_of(engine: VllmEngine, job: Job) -> list[dict[str, Any]]:
    """Everything that a job says, in order."""
    return [dataclasses.asdict(event) async for events in engine.generate(job) for event in events]


async def cancelled(engine: VllmEngine, job: Job) -> bool:
    """Whether vLLM has nothing left to do after a listener went away in the middle of an answer."""
    events = engine.generate(job)
    await anext(events)
    at_work = engine.at_work
    await events.aclose()
    return at_work == job.sampling.n and engine.at_work == 0


async def answer(model: str, exported: Path, folder: Path) -> None:
    """All jobs at once, then one that is cancelled."""
    engine = VllmEngine(model, exported, "float32", n_rows=16, memory_share=0.05)
    latents = load_file(folder / "latents.safetensors")
    jobs = [
        Job(name, latents[name], question, Sampling(**{**sampling, "stop": tuple(sampling["stop"])}))
        for name, question, sampling in json.loads((folder / "jobs.json").read_text())
    ]
    try:
        answers = await asyncio.gather(*(events_of(engine, job) for job in jobs))
        longer = dataclasses.replace(jobs[0], sampling=Sampling(max_tokens=500, temperature=2.0, n=16))
        told = {"answers": answers, "cancelled": await cancelled(engine, longer)}
    finally:
        engine.close()
    (folder / "events.json").write_text(json.dumps(told))


if __name__ == "__main__":
    asyncio.run(answer(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
