"""Many runs over a grid of settings and seeds, and one table of what came out."""

from trainer.sweep.run import SweepOptions, run_sweep

__all__ = ["SweepOptions", "run_sweep"]
