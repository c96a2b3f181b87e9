"""Training: methods, schedules, the loop, and what a checkpoint holds."""

from tangentlab.training.atta import ATTATraining
from tangentlab.training.checkpoint import (
    all_weights,
    judged_weights,
    load_all_weights,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_weights,
    write_weights,
)
from tangentlab.training.fgsm import FGSMTraining
from tangentlab.training.fgsm_pgi import FGSMPGITraining
from tangentlab.training.fgsm_rs import FGSMRSTraining
from tangentlab.training.free import FreeTraining
from tangentlab.training.grad_align import GradAlignTraining
from tangentlab.training.loop import Controller, Step, StepHook, TrainingState, check_parameters, train
from tangentlab.training.method import Adversarial, Batch, Memory, Method, Network, Share
from tangentlab.training.n_fgsm import NFGSMTraining
from tangentlab.training.pgd import PGDTraining
from tangentlab.training.recalibration import recalibrate
from tangentlab.training.schedules import SCHEDULES
from tangentlab.training.standard import Standard
from tangentlab.training.trades import TRADESTraining
from tangentlab.training.update_align import UpdateAlignTraining
from tangentlab.training.zero_grad import ZeroGradTraining

METHODS: dict[str, type[Method]] = {
    "standard": Standard,
    "pgd": PGDTraining,
    "trades": TRADESTraining,
    "fgsm": FGSMTraining,
    "fgsm_rs": FGSMRSTraining,
    "n_fgsm": NFGSMTraining,
    "free": FreeTraining,
    "grad_align": GradAlignTraining,
    "zero_grad": ZeroGradTraining,
    "fgsm_pgi": FGSMPGITraining,
    "atta": ATTATraining,
    "update_align": UpdateAlignTraining,
}
"""The methods by the name that a configuration calls them."""

__all__ = [
    "METHODS",
    "SCHEDULES",
    "ATTATraining",
    "Adversarial",
    "Batch",
    "Controller",
    "FGSMPGITraining",
    "FGSMRSTraining",
    "FGSMTraining",
    "FreeTraining",
    "GradAlignTraining",
    "Memory",
    "Method",
    "NFGSMTraining",
    "Network",
    "PGDTraining",
    "Share",
    "Standard",
    "Step",
    "StepHook",
    "TRADESTraining",
    "TrainingState",
    "UpdateAlignTraining",
    "ZeroGradTraining",
    "all_weights",
    "check_parameters",
    "judged_weights",
    "load_all_weights",
    "load_checkpoint",
    "load_weights",
    "recalibrate",
    "save_checkpoint",
    "save_weights",
    "train",
    "write_weights",
]
