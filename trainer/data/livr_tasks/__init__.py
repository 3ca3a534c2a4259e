"""Training sets of the nine perception tasks that LIVR is trained on, built from raw public data sets.

`build_task` turns one raw data set into train and val splits in the generic JSONL format (`trainer.data.jsonl`).
"""

from trainer.data.livr_tasks.build import TASKS, BuildReport, build_task

__all__ = ["TASKS", "BuildReport", "build_task"]
