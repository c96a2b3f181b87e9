"""Training: methods, schedules, the loop, and what a checkpoint holds."""

from tangentlab.training.checkpoint import load_checkpoint, load_weights, save_checkpoint, save_weights
from tangentlab.training.fgsm import FGSMTraining
from tangentlab.training.loop import Step, StepHook, TrainingState, check_parameters, train
from tangentlab.training.method import Method, Network
from tangentlab.training.pgd import PGDTraining
from tangentlab.training.schedules import SCHEDULES
from tangentlab.training.standard import Standard

METHODS: dict[str, type[Method]] = {"standard": Standard, "fgsm": FGSMTraining, "pgd": PGDTraining}
"""The methods by the name that a configuration calls them."""

__all__ = [
    "METHODS",
    "SCHEDULES",
    "FGSMTraining",
    "Method",
    "Network",
    "PGDTraining",
    "Standard",
    "Step",
    "StepHook",
    "TrainingState",
    "check_parameters",
    "load_checkpoint",
    "load_weights",
    "save_checkpoint",
    "save_weights",
    "train",
]
