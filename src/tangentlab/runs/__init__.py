"""Runs: from a configuration to a folder with metrics, kernels, checkpoints and evaluations."""

from tangentlab.runs.config import RunConfig
from tangentlab.runs.evaluation import evaluate
from tangentlab.runs.parsing import load_config, resolve, shipped_configs
from tangentlab.runs.processes import is_first_process
from tangentlab.runs.run import train

__all__ = ["RunConfig", "evaluate", "is_first_process", "load_config", "resolve", "shipped_configs", "train"]
