"""What a run will need, before any weight is loaded: memory of every process, time of a step, what limits it."""

from trainer.estimate.report import print_estimate

__all__ = ["print_estimate"]
