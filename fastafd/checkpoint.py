"""Files of weights and of whole runs. They are written completely or not at all, and reading them runs no code."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastafd.files import write_atomic
from fastafd.models import build_model
from fastafd.settings import UsageError

CONTAINERS = ("state_dict", "model_state_dict", "model", "model_ema", "ema", "net", "last")
PREFIXES = ("module.", "_orig_mod.")


def save_run(path: Path, state: dict[str, Any]) -> None:
    """Write everything that a resumed run needs."""
    write_atomic(path, lambda temporary: torch.save(state, temporary))


def load_run(path: Path) -> dict[str, Any]:
    """Read the file of `save_run`, onto the CPU. UsageError for a missing, truncated or foreign file."""
    state = _load_pickle(path, "resume")
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
    try:
        about = header_of(file)
    except (SafetensorError, OSError):
        raise UsageError(
            f"model: {file} is not a safetensors file; for other weights give --arch and --weights"
        ) from None
    if not about:
        raise UsageError(f"model: {file} does not say which classifier it holds; give --arch and --weights")
    net = build_model(about["arch"], about["num_classes"], about["normalize"])
    fit_weights(net, load_weights(file), file)
    return net.eval(), about


def header_of(file: Path) -> dict[str, Any]:
    """The header that `save_model` wrote; empty for a safetensors file of another program."""
    with safe_open(file, framework="pt") as opened:
        header: dict[str, Any] = json.loads((opened.metadata() or {}).get("fastafd", "{}"))
    return header


def load_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file: safetensors, or a pickle that holds only tensors.

    Containers such as `state_dict`, `model` and `net`, and the prefixes `module.` and `_orig_mod.`, are removed as
    often as they occur. UsageError for a missing, truncated or foreign file.
    """
    if not path.is_file():
        raise UsageError(f"weights: got {path}, takes a file of weights, and there is none")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as opened:
                return {_strip(name): opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError) as error:
            raise UsageError(f"weights: {path} is not a complete safetensors file: {error}") from None
    state = _load_pickle(path, "weights")
    while isinstance(state, dict) and not any(isinstance(value, Tensor) for value in state.values()):
        inner = next((state[name] for name in CONTAINERS if isinstance(state.get(name), dict)), None)
        if inner is None:
            break
        state = inner
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise UsageError(f"weights: {path} holds no state dict")
    return {_strip(str(name)): value for name, value in state.items() if isinstance(value, Tensor)}


def fit_weights(net: nn.Module, weights: dict[str, Tensor], source: Path | str) -> None:
    """Load `weights` strictly into `net`. UsageError names what does not fit."""
    state = net.state_dict()
    if (
        "normalize.mean" in state
        and "normalize.mean" not in weights
        and not any(n.startswith("model.") for n in weights)
    ):
        weights = {f"model.{name}": value for name, value in weights.items()}
        weights |= {name: state[name] for name in ("normalize.mean", "normalize.std")}
    if "normalize.mean" in weights and "normalize.mean" not in state:
        raise UsageError(f"weights: {source} carries a normalisation layer; say which with --normalize")
    # WRNs of TRADES have a copy of block1 that no forward pass reads; old files have no counters.
    weights = {
        name: value for name, value in weights.items() if not name.startswith(("sub_block1.", "model.sub_block1."))
    }
    for name, value in state.items():
        if name.endswith("num_batches_tracked"):
            weights.setdefault(name, value)
    missing, extra = sorted(state.keys() - weights.keys()), sorted(weights.keys() - state.keys())
    if missing or extra:
        problem = f"no {missing[0]}" if missing else f"an unknown {extra[0]}"
        raise UsageError(
            f"weights: {source} does not fit the architecture: {len(missing)} missing and {len(extra)} unknown"
            f" tensors, among them {problem}"
        )
    for name, value in state.items():
        if weights[name].shape != value.shape:
            raise UsageError(
                f"weights: {source} does not fit the architecture: {name} is {tuple(weights[name].shape)},"
                f" takes {tuple(value.shape)}"
            )
        if not weights[name].isfinite().all():
            raise UsageError(f"weights: {source} holds numbers that are not finite, in {name}")
    net.load_state_dict(weights)


def _strip(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.removeprefix(PREFIXES[0]).removeprefix(PREFIXES[1])
    return name


def _load_pickle(path: Path, field: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"{field}: got {path}, and there is no such file") from None
    except (pickle.UnpicklingError, EOFError, RuntimeError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        reason = (
            "it holds more than tensors"
            if "weights_only" in str(error).lower()
            else "it is truncated or not a PyTorch file"
        )
        raise UsageError(f"{field}: {path} cannot be read: {reason}") from None
