"""Runs: from a configuration to a folder with metrics, kernels, checkpoints and evaluations."""

from tangentlab.runs.config import Precision, RunConfig
from tangentlab.runs.evaluation import evaluate
from tangentlab.runs.many import BACKENDS, Outcome, check_outcomes, train_many
from tangentlab.runs.parsing import load_config, resolve, shipped_configs
from tangentlab.runs.processes import is_first_process
from tangentlab.runs.run import check_same, train

__all__ = [
    "BACKENDS",
    "Outcome",
    "Precision",
    "RunConfig",
    "check_outcomes",
    "check_same",
    "evaluate",
    "is_first_process",
    "load_config",
    "resolve",
    "shipped_configs",
    "train",
    "train_many",
]
