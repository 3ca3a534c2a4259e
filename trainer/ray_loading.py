"""`data.engine: ray`: Ray Data makes the images of the next steps ready, with as many workers as CPUs are free
when training starts.

Each worker process reads the index for itself, so `data.path` and the model's folder must be readable on every node
under the same name. A row of the stream is one step. It says the step's number; a worker answers with the microbatches,
which depend on seed and step alone, and Ray Data keeps the rows in order.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.data

from shared.config import Config
from shared.errors import DataError, ResourceError
from shared.vlm import load_processor, load_prompt, vlm_config
from shared.vlm.families import family_of
from trainer.data import ErrorPolicy
from trainer.image_features import ImagePreparer
from trainer.loading import Prepared, prepared_parts, training_sampler
from trainer.methods import METHODS

_MOST_WORKERS = 16


class RayLoader:
    """A stream of steps from the first one that is asked for. Ray must have been started."""

    def __init__(self, config: Config):
        self._config = config
        self._rows: Iterator[dict[str, Any]] | None = None
        self._next = 0

    def parts(self, step: int) -> list[Prepared]:
        """The step's microbatches. Raises DataError naming image and record; ResourceError without free CPUs."""
        if self._rows is None or step != self._next:
            self._rows = iter(self._stream(step))
        self._next = step + 1
        # What our own workers have pickled; Ray sends everything so.
        found: list[Prepared] | str = pickle.loads(next(self._rows)["parts"])
        if isinstance(found, str):
            raise DataError(found)
        return found

    def close(self) -> None:
        """End the stream and its workers."""
        self._rows = None

    def _stream(self, first: int) -> Iterator[dict[str, Any]]:
        free = int(ray.available_resources().get("CPU", 0.0))
        if free < 2:
            raise ResourceError(
                f"data.engine: ray needs two CPUs beside what the anchors take, {free} are free; add a node, lower "
                "anchors[].cpus, or set data.engine: local"
            )
        # One CPU stays free for the tasks that give the numbers of the steps: workers that held all would wait forever.
        n_steps = self._config.train.steps - first
        steps = ray.data.range(n_steps, override_num_blocks=n_steps)
        steps.context.execution_options.preserve_order = True
        steps.context.enable_progress_bars = False
        arguments = (self._config.model_dump(mode="json"), first)
        loaded = steps.map_batches(
            _Worker,
            batch_size=1,
            fn_constructor_args=arguments,
            compute=ray.data.ActorPoolStrategy(size=min(free - 1, _MOST_WORKERS)),
            num_cpus=1,
        )
        rows: Iterator[dict[str, Any]] = loaded.iter_rows()
        return rows


class _Worker:
    """Makes steps ready, in a process of its own."""

    def __init__(self, config: dict[str, Any], first: int):
        self._config, self._first = Config.model_validate(config), first
        model = self._config.generator.model
        family = family_of(vlm_config(model).model_type, model)
        _, self._sampler = training_sampler(self._config, load_prompt(model))
        self._images = ImagePreparer(partial(load_processor(model).image_inputs, family), cache=None)
        self._on_error = ErrorPolicy(self._config.data.on_error)

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, list[bytes]]:
        batch = self._sampler.batch(self._first + int(rows["id"][0]))
        found: list[Prepared] | str
        try:
            n_parts, seen = self._config.train.fewest_microbatches, METHODS[self._config.method].seen
            found = prepared_parts(batch, n_parts, self._images, seen, self._on_error)
        except DataError as error:
            found = str(error)
        return {"parts": [pickle.dumps(found)]}
