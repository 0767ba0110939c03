"""The samples of a run that a report shows: attacked test images with predictions, and features of attacked images.

They are written to `samples.npz` of the run folder, which can be read without torch:

    images (k,H,W,3) uint8; perturbation (k,H,W,3) float16, in pixels of [0,1]; label, clean, attacked (k,): classes
    before (n,D) float16: pooled features of attacked images; f1 (n,D) float16: what the classifier reads
    feature_label (n,): their classes

The attack is that of the evaluation, PGD-20. k: one image for each of the first ten classes. n: at most a thousand.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastafd.data import Split, balanced_draw, to_unit
from fastafd.device import true_fp32
from fastafd.evaluation import pgd20
from fastafd.files import write_atomic
from fastafd.models import SplitNet, eval_mode, frozen

SHOWN, FEATURES, AT_ONCE = 10, 1000, 250  # images shown, images whose features are kept, images at a time


@true_fp32()
def save_samples(path: Path, model: SplitNet, test: Split, n: int | None, seed: int, eps: float) -> None:
    """Write the samples of the model to `path`; they come from a class-balanced draw of at most `n` test images.

    eps: the radius of PGD-20.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    indices = balanced_draw(test.labels, min(FEATURES, n or FEATURES), seed)
    attack = pgd20(eps)
    batches: dict[str, list[Tensor]] = {name: [] for name in ("before", "f1", "clean", "attacked", "perturbation")}
    with eval_mode(model), frozen(model):
        for first in range(0, len(indices), AT_ONCE):
            part = indices[first : first + AT_ONCE]
            x = to_unit(torch.from_numpy(test.images(part))).to(device)
            x_adv = attack.perturb(model, x, torch.from_numpy(test.labels[part]).to(device), generator)
            with torch.no_grad():
                before, f1 = model.features(x_adv), model.f1(x_adv)
                predicted = model(x).argmax(1), model.classifier(f1).argmax(1)
            results = (before, f1, *predicted, (x_adv - x).permute(0, 2, 3, 1))
            for name, value in zip(batches, results, strict=True):
                batches[name].append(value.cpu())
    arrays = {name: torch.cat(values).numpy() for name, values in batches.items()}
    labels = test.labels[indices]
    _, firsts = np.unique(labels, return_index=True)
    shown = firsts[:SHOWN]
    samples = {
        "images": test.images(indices[shown]),
        "perturbation": arrays["perturbation"][shown].astype(np.float16),
        "label": labels[shown],
        "clean": arrays["clean"][shown],
        "attacked": arrays["attacked"][shown],
        "before": arrays["before"].astype(np.float16),
        "f1": arrays["f1"].astype(np.float16),
        "feature_label": labels,
    }

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **samples)

    write_atomic(path, write)
