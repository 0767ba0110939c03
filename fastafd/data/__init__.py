"""Data sets of uint8 images, the .beton cache, three loaders that deliver the same batches, and augmentation."""

from fastafd.data.augment import Augment, to_unit
from fastafd.data.beton import ensure_beton
from fastafd.data.loaders import LOADERS, Loader, epoch_order, make_loader
from fastafd.data.sources import DATASETS, Dataset, load_dataset
from fastafd.data.splits import ArraySplit, FolderSplit, Split, balanced_draw

__all__ = [
    "DATASETS",
    "LOADERS",
    "ArraySplit",
    "Augment",
    "Dataset",
    "FolderSplit",
    "Loader",
    "Split",
    "balanced_draw",
    "ensure_beton",
    "epoch_order",
    "load_dataset",
    "make_loader",
    "to_unit",
]
