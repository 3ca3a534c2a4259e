"""Training methods, one file each. A method turns a batch into a loss; `METHODS` is the table."""

from trainer.methods.anchored import AnchoredMethod

METHODS = {"anchored": AnchoredMethod}
