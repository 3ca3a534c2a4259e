"""The training loop: read a batch, write latents, have the anchors read them, step, record.

`train_run` sets everything up; `Trainer.step` is one optimization step from top to bottom.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anchor_service.pool import AnchorPool
from shared.config import Config, dump_config
from shared.errors import ConfigError, NonFiniteError, NonFiniteReplyError
from shared.vlm import load_prompt
from shared.vlm.generator import Generator
from trainer.bridge import AnchorDroppedError
from trainer.checkpoint import CheckpointStore, load_trainer_state
from trainer.data import ErrorPolicy, load_records, readable_records
from trainer.data.records import Record
from trainer.data.sampling import Sampler
from trainer.image_features import ImageFeatures
from trainer.loading import Prepared, make_loader, ray_of_loader, training_sampler
from trainer.methods import METHODS
from trainer.metrics import MetricsWriter
from trainer.microbatches import Microbatches
from trainer.model_card import model_card
from trainer.progress import TrainProgress

log = logging.getLogger(__name__)

_PROBE_IMAGES = 16
CONFIG_FILE = "config.yaml"


class Trainer:
    """Everything that one run holds. Owned by the main thread."""

    def __init__(self, config: Config, generator: Generator, pool: AnchorPool, sampler: Sampler):
        self.config = config
        self.generator = generator
        self.pool = pool
        self._sampler = sampler
        self.method = METHODS[config.method](config, generator, pool)
        t = config.train
        groups = [
            {"params": [*generator.lora_parameters, *self.method.extra_modules.parameters()], "lr": t.lr_lora},
            {"params": generator.token_parameters, "lr": t.lr_tokens},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=t.betas, weight_decay=t.weight_decay)
        self._base_lrs = [t.lr_lora, t.lr_tokens]
        self.microbatches = Microbatches(t.microbatches, t.batch_images, pool.has_remote)
        self.features = ImageFeatures(generator, config.data.feature_cache)
        self._loader = make_loader(config, sampler, self.features, self.microbatches)

    def step(self, step: int) -> dict[str, Any]:
        """One optimization step; returns its metrics. Raises NonFiniteError naming records; nothing changes then."""
        started = time.perf_counter()
        parts = self._loader.parts(step)
        waited = time.perf_counter() - started
        if self.method.starts_stage(step):
            self.optimizer.state.clear()
        share = self.method.lr_share(step)
        for group, base_lr in zip(self.optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = base_lr * share

        metrics = self._accumulate_until_complete(parts, step)

        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.train.clip_norm)
        if not torch.isfinite(grad_norm):
            records = ", ".join(r.record_id for part in parts for r in part.batch.records)
            raise NonFiniteError(f"step {step}: the gradient is NaN or infinite; its images: {records}")
        self.optimizer.step()

        seconds = time.perf_counter() - started
        self.microbatches.record(step, seconds - waited)
        return {
            **metrics,
            **self.features.metrics([part.images for part in parts]),
            **self._sampler.metrics(step, [part.batch for part in parts]),
            "grad_norm": float(grad_norm),
            "lr_lora": self.optimizer.param_groups[0]["lr"],
            "lr_tokens": self.optimizer.param_groups[1]["lr"],
            "step_ms": 1e3 * seconds,
            "data_wait_ms": 1e3 * waited,
            "images_per_s": self.config.train.batch_images / seconds,
            "anchors": len(self.pool.names),
            "microbatches": len(parts),
        }

    def _accumulate_until_complete(self, parts: list[Prepared], step: int) -> dict[str, float]:
        """`_accumulate`, again from the start without an anchor that was dropped on the way; so at most R times."""
        while True:
            try:
                return self._accumulate(parts, step)
            except AnchorDroppedError as error:
                log.warning("step %d is taken again: %s", step, error)

    def _accumulate(self, parts: list[Prepared], step: int) -> dict[str, float]:
        """Gradients of the mean loss over all microbatches, and the mean of their metrics.

        Raises AnchorDroppedError if not every microbatch was read by the same anchors, forward and backward.
        """
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        readers: set[str] = set()
        for part, emitted in self._emitted(parts, step):
            try:
                loss = self.method.loss(emitted, step)
                if not torch.isfinite(loss.total):
                    records = ", ".join(r.record_id for r in part.batch.records)
                    raise NonFiniteError(f"step {step}: the loss is {loss.total.item()} on images {records}")
                (loss.total / len(parts)).backward()
            except NonFiniteReplyError as error:
                names = ", ".join(part.batch.records[i].record_id for i in error.images)
                raise NonFiniteError(f"step {step}: {error}: {names}; check these records") from error
            if readers - set(loss.replies):
                raise AnchorDroppedError(f"{sorted(readers - set(loss.replies))} dropped between two microbatches")
            readers = set(loss.replies)
            values = dict(loss.terms)
            for name, reply in loss.replies.items():
                values[f"anchor_ms/{name}"] = 1e3 * (reply.timings.forward_s + reply.timings.backward_s)
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value / len(parts)
        return sums

    def _emitted(self, parts: list[Prepared], step: int) -> Iterator[tuple[Prepared, Any]]:
        """Each microbatch with its reads under way.

        Beside remote anchors the generator works one microbatch ahead of them: it writes the next one's latents
        before it waits for this one's replies, so the anchors always have a call in hand. Forward and backward
        passes keep their order among themselves, so every number is that of one microbatch after the other.
        """
        ahead = 1 if self.pool.has_remote else 0
        waiting: deque[tuple[Prepared, Any]] = deque()
        for part in parts:
            tokens = self.features.tokens(part.images)
            waiting.append((part, self.method.emit(part.batch, tokens, step)))
            if len(waiting) > ahead:
                yield waiting.popleft()
        yield from waiting

    def state(self, next_step: int) -> dict[str, Any]:
        """Trainer state beside the adapter: all that `load_state` needs for a bit-identical next step."""
        return {
            "next_step": next_step,
            "optimizer": self.optimizer.state_dict(),
            "extra_modules": self.method.extra_modules.state_dict(),
            "microbatches": self.microbatches.state(),
            "cpu_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state(self, state: dict[str, Any]) -> int:
        """Restore; returns the step to go on with."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.method.extra_modules.load_state_dict(state["extra_modules"])
        self.microbatches.load_state(state["microbatches"])
        torch.set_rng_state(state["cpu_rng"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        return int(state["next_step"])

    def close(self) -> None:
        """End the loader; finish writing to the feature cache."""
        self._loader.close()
        self.features.close()


def train_run(config: Config, resume: bool) -> bool:
    """Train to the end or until SIGTERM; returns whether the end was reached.

    The run folder must be new unless `resume`. Raises VisualLatentsError subclasses.
    """
    run_dir = config.run.dir
    store = CheckpointStore(run_dir, config.train.keep_checkpoints)
    if not resume and (run_dir / "metrics.jsonl").exists():
        raise ConfigError(
            f"{run_dir}: the run folder is in use; choose another run.dir, or go on with --resume {run_dir}"
        )
    prompt = load_prompt(config.generator.model)
    records, sampler = training_sampler(config, prompt)
    held_out = load_records(config.data, config.data.val_split, prompt).without_kinds(config.data.held_out_kinds)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / CONFIG_FILE).write_text(dump_config(config), encoding="utf-8")

    with _stop_signal() as stop, ray_of_loader(config):
        generator = Generator(config.generator, config.train.seed)
        policy = ErrorPolicy(config.data.on_error)
        first = readable_records(records, _PROBE_IMAGES, policy)
        validation = readable_records(held_out, config.train.validate_images, policy)
        probe = [data for record in first for data in record.image_bytes()][:_PROBE_IMAGES]
        shared_base = (generator.model, generator.adapter_off)
        with (
            AnchorPool.start(config, generator.handshake(), shared_base, probe_images=probe) as pool,
            contextlib.closing(Trainer(config, generator, pool, sampler)) as trainer,
        ):
            first_step = _restore(trainer, store) if resume else 0
            if first_step == 0:
                trainer.method.prepare(trainer.features, first)
            with (
                contextlib.closing(MetricsWriter(run_dir, config, first_step)) as metrics,
                TrainProgress(config, first_step) as progress,
            ):
                return _run_steps(trainer, store, metrics, progress, stop, first_step, validation)


def _run_steps(
    trainer: Trainer,
    store: CheckpointStore,
    metrics: MetricsWriter,
    progress: TrainProgress,
    stop: StopSignal,
    first_step: int,
    validation: Sequence[Record],
) -> bool:
    t = trainer.config.train
    for step in range(first_step, t.steps):
        if stop.asked:
            progress.warn(f"stopped on SIGTERM after step {step}; go on with --resume {trainer.config.run.dir}")
            return False
        trainer.generator.train()
        values = trainer.step(step)
        done, last = step + 1, step + 1 == t.steps
        if last or (t.validate_every and done % t.validate_every == 0):
            trainer.generator.train(False)
            values["validation_loss"] = trainer.method.validation_loss(trainer.features, validation)
        metrics.write(step, values)
        progress.update(done, values)
        for name, reason in trainer.pool.lost.items():
            progress.warn(f"anchor {name} is lost and dropped: {reason}")
        if done % t.checkpoint_every == 0 or last or stop.asked:
            _save(trainer, store, done, values)
    return True


def _save(trainer: Trainer, store: CheckpointStore, done: int, values: dict[str, Any]) -> Path:
    card = model_card(trainer.config, done, values)
    yaml_text = dump_config(trainer.config)
    return store.save(done, trainer.generator, trainer.state(done), yaml_text, card, values.get("validation_loss"))


def _restore(trainer: Trainer, store: CheckpointStore) -> int:
    """Load the newest whole checkpoint; returns the step to go on with (0 if there is none yet)."""
    checkpoint = store.newest()
    if checkpoint is None:
        log.warning("no checkpoint in %s yet; starting from step 0", trainer.config.run.dir)
        return 0
    trainer.generator.load_adapter(checkpoint.folder)
    return trainer.load_state(load_trainer_state(checkpoint))


@dataclass(slots=True)
class StopSignal:
    """Set by SIGTERM; the loop looks at it after each step."""

    asked: bool = False


@contextlib.contextmanager
def _stop_signal() -> Iterator[StopSignal]:
    stop = StopSignal()

    def ask(_signum: int, _frame: Any) -> None:
        stop.asked = True

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
