"""Data sets as byte tensors, their splits, and shuffled, augmented batches of them."""

from tangentlab.data.augment import Augmentation
from tangentlab.data.batches import Batches
from tangentlab.data.catalogue import DATASETS, load
from tangentlab.data.dataset import Dataset, Split
from tangentlab.data.splits import class_balanced, train_validation

__all__ = [
    "DATASETS",
    "Augmentation",
    "Batches",
    "Dataset",
    "Split",
    "class_balanced",
    "load",
    "train_validation",
]
