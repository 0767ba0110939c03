"""The files of a run: its classifiers and its state. They are written completely or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from fastafd.files import write_atomic
from fastafd.models import build_model
from fastafd.settings import UsageError
from fastafd.weights import fit_weights, load_pickle, read_weights


def save_run(path: Path, state: dict[str, Any]) -> None:
    """Write everything that a resumed run needs."""
    write_atomic(path, lambda temporary: torch.save(state, temporary))


def load_run(path: Path) -> dict[str, Any]:
    """Read the file of `save_run`, onto the CPU. UsageError for a missing, truncated or foreign file."""
    state = load_pickle(path, "resume")
    if not isinstance(state, dict) or "progress" not in state:
        raise UsageError(f"resume: {path} is not a checkpoint of a fastafd run")
    return state


# -- weights of one classifier ------------------------------------------------------------------------------------


def save_model(path: Path, net: nn.Module, about: dict[str, Any]) -> None:
    """Write a classifier as safetensors, with `about` (arch, num_classes, image_size, normalize, …) in the header."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    header = {"fastafd": json.dumps(about), "format": "pt"}
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=header))


def load_model(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The classifier of a run folder or of a `model.safetensors`, in eval mode; it takes pixels in [0,1].

    Raises UsageError for any other path.
    """
    net, _ = load_model_about(Path(path))
    return net.to(device)


def load_model_about(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The classifier of `load_model`, on the CPU, and the header of its file."""
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.exists():
        raise UsageError(f"model: got {path}, takes a run folder with a model.safetensors, or such a file")
    weights = read_weights(file, "model")
    about = weights.header
    if not {"arch", "num_classes", "normalize"} <= about.keys():
        raise weights.error("does not say which classifier it holds; give --arch and --weights")
    try:
        net = build_model(about["arch"], about["num_classes"], about["normalize"])
    except (RuntimeError, MemoryError, ValueError, OverflowError):  # a foreign header may ask for any size
        raise weights.error(f"names a classifier that cannot be built, {about['arch']}") from None
    fit_weights(net, weights, report=lambda _: None)  # which has nothing to choose in a file of save_model
    return net.eval(), about
