"""Public benchmarks from local files: format adapters, answer extraction, official metrics."""

from trainer.evaluation.benchmarks.extraction import likelihood_answer
from trainer.evaluation.benchmarks.records import BenchmarkRecord
from trainer.evaluation.benchmarks.suite import BENCHMARKS, load_benchmark, score

__all__ = ["BENCHMARKS", "BenchmarkRecord", "likelihood_answer", "load_benchmark", "score"]
