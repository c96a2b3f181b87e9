"""tangentlab: train networks adversarially and watch their neural tangent kernel while they learn.

``import tangentlab as tl`` is light; what plots, reads data sets or launches processes is loaded on use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tangentlab import attacks, metrics, modes, training
    from tangentlab.kernels import NTKOperator, ntk
    from tangentlab.metrics import top_eigenpairs
    from tangentlab.probes import KernelProbe, LazySwitch, OverfittingAlarm
    from tangentlab.randomness import generator
    from tangentlab.records import Measurement, Run, RunRecord, read_run
    from tangentlab.report import write_report
    from tangentlab.runs import RunConfig, evaluate, load_config, train, train_many

# name -> (module, attribute); no attribute: the module itself
_EXPORTS: dict[str, tuple[str, str | None]] = {
    "attacks": ("attacks", None),
    "kernels": ("kernels", None),
    "metrics": ("metrics", None),
    "modes": ("modes", None),
    "ntk": ("kernels", "ntk"),
    "NTKOperator": ("kernels", "NTKOperator"),
    "top_eigenpairs": ("metrics", "top_eigenpairs"),
    "KernelProbe": ("probes", "KernelProbe"),
    "LazySwitch": ("probes", "LazySwitch"),
    "OverfittingAlarm": ("probes", "OverfittingAlarm"),
    "generator": ("randomness", "generator"),
    "Measurement": ("records", "Measurement"),
    "Run": ("records", "Run"),
    "RunRecord": ("records", "RunRecord"),
    "read_run": ("records", "read_run"),
    "write_report": ("report", "write_report"),
    "RunConfig": ("runs", "RunConfig"),
    "evaluate": ("runs", "evaluate"),
    "load_config": ("runs", "load_config"),
    "train": ("runs", "train"),
    "train_many": ("runs", "train_many"),
    "training": ("training", None),
}

__all__ = [
    "KernelProbe",
    "LazySwitch",
    "Measurement",
    "NTKOperator",
    "OverfittingAlarm",
    "Run",
    "RunConfig",
    "RunRecord",
    "attacks",
    "evaluate",
    "generator",
    "kernels",
    "load_config",
    "metrics",
    "modes",
    "ntk",
    "read_run",
    "top_eigenpairs",
    "train",
    "train_many",
    "training",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'tangentlab' has no attribute {name!r}")
    module, attribute = _EXPORTS[name]
    loaded = importlib.import_module(f"tangentlab.{module}")
    value = loaded if attribute is None else getattr(loaded, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
