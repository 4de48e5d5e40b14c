"""Where a run's metrics are written (``run.loggers``): TensorBoard, Weights & Biases, a CSV file."""

from priorzero.runs.loggers.base import Axis, MetricsLogger
from priorzero.runs.loggers.writer import MetricsWriter, check_loggers, make_metrics_writer, metrics_files

__all__ = ["Axis", "MetricsLogger", "MetricsWriter", "check_loggers", "make_metrics_writer", "metrics_files"]
