"""Weights of others: which file is read, which state dict of it is taken, and what the refusals say."""

from __future__ import annotations

import argparse
import collections
import copy
import decimal
import gzip
import json
import pathlib
import pickle
import random
import types
import zipfile

import numpy as np
import pytest
import torch
from conftest import line_of, verb
from safetensors.torch import save_file
from torch import nn

import fastafd
from fastafd import train
from fastafd.checkpoint import save_model
from fastafd.models import NORMALIZATIONS, Normalize, build_model
from fastafd.settings import UsageError
from fastafd.weights import check_classes, check_classifier, fit_weights, read_weights

ARCH, CLASSES = "resnet8_half", 4
CIFAR10 = NORMALIZATIONS["cifar10"]
evaluate_main = verb("evaluate")["main"]


def classifier(seed: int, normalize: str = "none", classes: int = CLASSES) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(ARCH, classes, normalize)


def weights(seed: int = 0, prefix: str = "") -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in classifier(seed).state_dict().items()}


RAW, AVERAGE, OTHER = weights(0), weights(1), weights(2)


def load(content, folder, normalize: str = "none", arch: str = ARCH, classes: int = CLASSES):
    """The classifier with the weights in a file of that content, and the lines of the report."""
    torch.save(content, folder / "file.pt")
    net, lines = build_model(arch, classes, normalize), []
    fit_weights(net, read_weights(folder / "file.pt"), lines.append)
    return net, lines


def holds(net: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    core = net[1] if isinstance(net, nn.Sequential) else net
    return all(torch.equal(value, state[name]) for name, value in core.state_dict().items())


def refusal(content, folder, **more) -> str:
    with pytest.raises(UsageError) as error:
        load(content, folder, **more)
    assert str(error.value).startswith("weights: ") and "\n" not in str(error.value)
    return str(error.value)


# -- wrappers -----------------------------------------------------------------------------------------------------

PREFIXES = ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module._orig_mod.", "model.", "net.", "0.", "1."]
PREFIXES += ["model.module.", "module.model.", "backbone.net.", "1._orig_mod."]
CONTAINERS = ["state_dict", "model_state_dict", "model", "model_ema", "ema", "net", "last", "weights", "params"]
CONTAINERS += ["model_state", "ema_state_dict", "any other name"]


@pytest.mark.parametrize("prefix", ["", *PREFIXES])
@pytest.mark.parametrize("normalize", ["none", "cifar10"])
def test_prefixes_come_off(prefix, normalize, tmp_path):
    net, lines = load(weights(0, prefix), tmp_path, normalize)
    assert holds(net, RAW) and lines == []


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_come_off(name, tmp_path):
    for content in ({name: RAW}, {"epoch": 3, name: RAW, "step": torch.tensor(5)}, {"a": [{0: {name: RAW}}]}):
        net, lines = load(content, tmp_path)
        assert holds(net, RAW) and lines == []


def averaged_model():
    net = torch.optim.swa_utils.AveragedModel(classifier(0))
    net.update_parameters(classifier(0))
    return net.state_dict()


def recursive():
    content = {"state_dict": dict(RAW), "list": []}
    content["list"] += [content, content["list"]]
    return content


def with_optimizer():
    net = classifier(0).eval()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.rand(2, 3, 8, 8)).sum().backward()
    state = copy.deepcopy(net.state_dict())
    optimizer.step()
    return {"optimizer": optimizer.state_dict(), "net": state}


BESIDE = {
    "numpy scalars": {"acc": np.float64(0.5), "epoch": np.int64(3), "best": np.float32(1), "done": np.bool_(True)},
    "arrays": {"curve": np.arange(3.0), "names": np.array(["a", "b"]), "objects": np.array([1, None], dtype=object)},
    "rng states": {"rng": [np.random.get_state(), torch.get_rng_state(), random.getstate()]},
    "arguments": {"args": argparse.Namespace(lr=0.1, out=pathlib.Path("a/b"), pure=pathlib.PurePosixPath("c"))},
    "namespace": {"args": types.SimpleNamespace(lr=0.1)},
    "windows": {"out": pathlib.PureWindowsPath("c:/x")},
    "collections": {
        "default": collections.defaultdict(list, a=[1]),
        "counter": collections.Counter("aab"),
        "ordered": collections.OrderedDict(a=1),
        "set": {1, 2},
        "type": list,
        "bytes": [b"", b"abc"],
    },
    "version": {"torch": torch.__version__, "size": torch.Size([2]), "dtype": torch.float16},
    "tensor": {"best_acc": torch.tensor(0.5), "prototypes": torch.rand(3, 5)},
    "sparse": {"matrix": torch.eye(3).to_sparse(), "empty": torch.empty(2, device="meta")},
    "numbers as names": {"more": {0: torch.rand(2), 1: {"x": 2}}},
}


@pytest.mark.parametrize("what", BESIDE)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_lies_beside_the_weights_does_not_matter(what, zipped, tmp_path):
    torch.save({**BESIDE[what], "state_dict": RAW}, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    fit_weights(net := classifier(9), read_weights(tmp_path / "file.pt"), lambda line: pytest.fail(line))
    assert holds(net, RAW)


@pytest.mark.parametrize(
    "what", ["averaged", "cycle", "optimizer", "namespace", "parameters", "wrapped block", "double"]
)
def test_other_wrappings(what, tmp_path):
    content = {
        "averaged": averaged_model,
        "cycle": recursive,
        "optimizer": with_optimizer,
        "namespace": lambda: argparse.Namespace(weights=RAW),
        "parameters": lambda: {name: value if "num" in name else nn.Parameter(value) for name, value in RAW.items()},
        "wrapped block": lambda: {name.replace("layer1.", "layer1._orig_mod.module."): v for name, v in RAW.items()},
        "double": lambda: {name: value.double() if "num" not in name else value for name, value in RAW.items()},
    }[what]()
    net, lines = load(content, tmp_path)
    assert holds(net, RAW) and lines == []


def test_arrays_are_weights_too(tmp_path):
    for order in ("<f4", ">f4"):
        arrays = {name: value.numpy() for name, value in RAW.items()}
        arrays |= {name: np.asfortranarray(v).astype(order) for name, v in arrays.items() if v.ndim}
        net, lines = load({"state_dict": arrays}, tmp_path)
        assert holds(net, RAW) and lines == []
    assert "on the device meta" in refusal({name: value.to("meta") for name, value in RAW.items()}, tmp_path)


def test_counters_may_be_fractions(tmp_path):
    counted = {name: value + 78_200 if name.endswith("tracked") else value for name, value in RAW.items()}
    for kind in (torch.float32, torch.float16):  # in which the counter is infinite
        net, _ = load({name: value.to(kind) for name, value in counted.items()}, tmp_path)
        counter = net.state_dict()["bn1.num_batches_tracked"]
        assert counter.dtype == torch.int64 and counter == (78_200 if kind == torch.float32 else 0)


def test_depth_has_an_end(tmp_path):
    content = RAW
    for _ in range(100):
        content = [content]
    assert "no state dict" in refusal(content, tmp_path)


def test_safetensors_are_wrapped_too(tmp_path):
    save_file(
        {name: value.contiguous() for name, value in weights(0, "module.net.").items()}, tmp_path / "a.safetensors"
    )
    fit_weights(net := classifier(9), read_weights(tmp_path / "a.safetensors"), lambda line: pytest.fail(line))
    assert holds(net, RAW)


def test_old_files_without_counters_and_trades_files_with_a_spare_block(tmp_path):
    state = build_model("wrn10_2", 10).state_dict()
    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    old |= {f"sub_{name}": value for name, value in old.items() if name.startswith("block1.")}
    for prefix in ("", "module.", "model."):
        net, lines = load({prefix + name: value for name, value in old.items()}, tmp_path, arch="wrn10_2", classes=10)
        assert torch.equal(net.fc.weight, state["fc.weight"]) and lines == []


def test_tensors_outside_the_prefix_are_named(tmp_path):
    extra = {f"projection.{i}": torch.rand(2) for i in range(5)}
    net, lines = load({**weights(0, "encoder."), **extra}, tmp_path)
    assert holds(net, RAW)
    assert len(lines) == 1 and "encoder" in lines[0]
    assert "projection.0, projection.1, projection.2 and 2 more left out" in lines[0]


# -- which of several ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, took, left",
    [
        ({"model_ema": AVERAGE, "state_dict": RAW}, "state_dict", "model_ema"),
        ({"ema": {"model": AVERAGE}, "model": RAW}, "model", "ema.model"),
        ({"ema_state_dict": AVERAGE, "model_state_dict": RAW}, "model_state_dict", "ema_state_dict"),
        ({"swa_net": AVERAGE, "best": RAW}, "best", "swa_net"),
        ({"net": AVERAGE, "model": RAW}, "model", "net"),
        ({"teacher": AVERAGE, "net": RAW}, "net", "teacher"),
        ({**RAW, "ema": AVERAGE}, "the top level", "ema"),
        ({**RAW, **weights(1, "ema.")}, "the top level", "ema"),
        ({**weights(0, "module."), **weights(1, "ema.module.")}, "the top level", "ema"),
        (
            {"state_dict": {**weights(1, "ema_model."), **weights(0, "model.")}},
            "state_dict.model",
            "state_dict.ema_model",
        ),
        ({"runs": [{"ema": AVERAGE, "net": RAW}]}, "runs.0.net", "runs.0.ema"),
    ],
)
def test_the_order_of_preference(content, took, left, tmp_path):
    net, lines = load(content, tmp_path)
    assert holds(net, RAW)
    assert lines == [f"{tmp_path / 'file.pt'}: took {took}; {left} was left"]


@pytest.mark.parametrize(
    "content, names",
    [
        ({"student": RAW, "teacher": AVERAGE}, ["student", "teacher"]),
        ({**weights(0, "student."), **weights(1, "teacher.")}, ["student", "teacher"]),
        ({"student": {"model": RAW}, "teacher": {"net": AVERAGE}}, ["student.model", "teacher.net"]),
        ({"nets": [RAW, AVERAGE]}, ["nets.0", "nets.1"]),
        ({"ema": RAW, "swa": AVERAGE}, ["ema", "swa"]),
        ({"a": RAW, "b": AVERAGE, "c": OTHER}, ["a", "b"]),
    ],
)
def test_without_an_order_both_are_named(content, names, tmp_path):
    line = refusal(content, tmp_path)
    assert all(name in line for name in names) and "torch.save(model.state_dict(), FILE)" in line


def test_equal_copies_are_one(tmp_path):
    counted = {name: value + 1 if name.endswith("tracked") else value.clone() for name, value in RAW.items()}
    for content in ({"student": RAW, "teacher": counted}, {**weights(0, "a."), **weights(0, "b.")}):
        net, lines = load(content, tmp_path)
        assert torch.equal(net.conv1.weight, RAW["conv1.weight"]) and lines == []


def test_files_of_the_library_robustness(tmp_path):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in CIFAR10)
    content = {**weights(0, "module.model."), **weights(0, "module.attacker.model.")}
    for place in ("module.normalizer.", "module.attacker.normalize."):
        content |= {place + "new_mean": mean, place + "new_std": std}
    net, lines = load({"model": content, "epoch": 3}, tmp_path, "cifar10")
    assert holds(net, RAW) and lines == []


# -- normalisation ------------------------------------------------------------------------------------------------

LAYERS = ["0.mean 0.std 1.", "normalize.mean normalize.std model.", "mu sigma ", "mean std model.", "mu std net."]
LAYERS += [
    "normalizer.new_mean normalizer.new_std model.",
    "module.0.mean module.0.std module.1.",
    "a.b.mu a.b.sigma n.",
]


def normalised(layer: str, values, shape=(1, 3, 1, 1), seed: int = 0):
    mean, std, prefix = layer.split(" ")
    tensors = (torch.tensor(value).view(shape) for value in values)
    return dict(zip((mean, std), tensors)) | weights(seed, prefix)


@pytest.mark.parametrize("shape", [(3,), (3, 1, 1), (1, 3, 1, 1)])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_normalisation_is_loaded(layer, shape, tmp_path):
    content = {"state_dict": normalised(layer, CIFAR10, shape)}
    net, lines = load(content, tmp_path, "cifar10")
    assert holds(net, RAW) and lines == []
    torch.testing.assert_close(net.normalize.mean.flatten(), torch.tensor(CIFAR10[0]), rtol=0, atol=0)
    line = refusal(content, tmp_path)
    assert "mean 0.4914, 0.4822, 0.4465 and std 0.2471, 0.2435, 0.2616" in line and "--normalize cifar10" in line


def test_the_normalisation_of_the_file_counts(tmp_path):
    half = ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    net, lines = load(normalised(LAYERS[0], half), tmp_path, "cifar10")
    assert len(lines) == 1 and "mean 0.5, 0.5, 0.5 and std 0.2, 0.2, 0.2" in lines[0]
    assert net.normalize.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(net.eval()(x), nn.Sequential(Normalize(*half), classifier(0).eval())(x))
    line = refusal(normalised(LAYERS[0], half), tmp_path)
    assert "no --normalize has these values" in line and "--normalize cifar10" in line


def test_rounded_values_are_those_of_the_name(tmp_path):
    rounded = ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262))
    net, lines = load(normalised(LAYERS[0], rounded), tmp_path, "cifar10")
    assert lines == [] and net.normalize.mean[0, 0, 0, 0].item() == pytest.approx(0.491)


def test_a_layer_that_changes_nothing_needs_no_flag(tmp_path):
    net, lines = load(normalised(LAYERS[0], ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))), tmp_path)
    assert holds(net, RAW) and lines == []


def test_a_normalisation_beside_the_state_dict(tmp_path):
    content = {"state_dict": RAW, "mean": torch.tensor(CIFAR10[0]), "std": torch.tensor(CIFAR10[1])}
    assert "--normalize cifar10" in refusal(content, tmp_path)
    assert load(content, tmp_path, "cifar100")[1] != []


def test_each_network_has_its_own_normalisation(tmp_path):
    student, teacher = (normalised("n.mean n.std model.", NORMALIZATIONS[name]) for name in ("cifar10", "imagenet"))
    content = {f"net.{n}": v for n, v in student.items()} | {f"ema.{n}": v + 1 for n, v in teacher.items()}
    net, lines = load(content, tmp_path, "cifar10")
    assert holds(net, RAW) and len(lines) == 1 and "ema.model was left" in lines[0]
    assert net.normalize.mean.flatten().tolist() == pytest.approx(CIFAR10[0])


def test_two_normalisations_in_a_row_are_refused(tmp_path):
    content = normalised("1.0.mean 1.0.std 1.1.", CIFAR10)
    content |= {"0.mean": torch.full((3,), 0.5), "0.std": torch.full((3,), 0.5)}
    assert "two normalisations" in refusal(content, tmp_path, normalize="cifar10")


@pytest.mark.parametrize(
    "values, words",
    [
        (((0.5, 0.5, 0.5), (0.5, 0.0, 0.5)), "takes a mean in"),
        (((0.5, np.nan, 0.5), (0.5, 0.5, 0.5)), "not finite"),
    ],
)
def test_a_normalisation_that_cannot_be(values, words, tmp_path):
    assert words in refusal(normalised(LAYERS[0], values), tmp_path, normalize="cifar10")


def test_without_one_in_the_file_the_net_keeps_its_own(tmp_path):
    net, lines = load(RAW, tmp_path, "imagenet")
    assert lines == [] and net.normalize.mean.flatten().tolist() == pytest.approx(NORMALIZATIONS["imagenet"][0])


@pytest.mark.parametrize(
    "mean, std",
    [
        ((123.7, 116.3, 103.5), (58.4, 57.1, 57.4)),
        ((0.5, 0.5, 0.5), (4.0, 4.1, 3.8)),
        ((0.5, 0.5, 0.5), (1e-30, 1e-30, 1e-30)),
        ((-0.5, -0.5, -0.5), (0.5, 0.5, 0.5)),
    ],
)
def test_a_normalisation_of_other_images_is_refused(mean, std, tmp_path):
    for normalize in ("none", "cifar10"):
        line = refusal(normalised(LAYERS[0], (mean, std)), tmp_path, normalize=normalize)
        assert f"mean {mean[0]:.4g}, " in line and f"std {std[0]:.4g}, " in line
        assert "images are in [0, 1]; divide constants for 0 to 255 by 255" in line and "--normalize" not in line


MEAN, STD = CIFAR10


@pytest.mark.parametrize(
    "beside",
    [
        {"mean": MEAN, "std": STD},
        {"mean": np.array(MEAN), "std": np.array(STD, dtype=np.float32)},
        {"mean": [np.float64(x) for x in MEAN], "std": [np.float32(x) for x in STD]},
        {"normalize": {"mean": list(MEAN), "std": list(STD)}},
        {"args": argparse.Namespace(mean=MEAN, std=STD)},
        {"config": {"data": {"pixel_mean": MEAN, "pixel_std": STD}}},
    ],
    ids=str,
)
def test_constants_that_are_no_tensors_are_used(beside, tmp_path):
    content = {"state_dict": RAW, **beside}
    assert "--normalize cifar10" in refusal(content, tmp_path)
    net, lines = load(content, tmp_path, "imagenet")
    assert holds(net, RAW) and len(lines) == 1 and "its own normalisation" in lines[0]
    assert net.normalize.std.flatten().tolist() == pytest.approx(STD)


@pytest.mark.parametrize(
    "content, names",
    [
        ({"0.mean": torch.tensor(0.5), "0.std": torch.tensor(0.5), **weights(0, "1.")}, "0.mean, 0.std"),
        ({"0.mean": torch.rand(3, 8, 8), "0.std": torch.rand(3, 8, 8), **weights(0, "1.")}, "0.mean, 0.std"),
        ({"0.means": torch.rand(3), "0.sds": torch.rand(3), **weights(0, "1.")}, "0.means, 0.sds"),
        ({"0.weight": torch.rand(3), "0.bias": torch.rand(3), **weights(0, "1.")}, "0.weight, 0.bias"),
        ({**weights(0, "model."), "norm.weight": torch.rand(3), "norm.bias": torch.rand(3)}, "norm.weight, norm.bias"),
        ({"0.weight": torch.rand(3, 3, 1, 1), **weights(0, "1.")}, "0.weight"),
        ({"state_dict": RAW, "mean": MEAN}, "mean"),
        ({"state_dict": RAW, "args": argparse.Namespace(mean=0.5, std=0.5)}, "args.mean, args.std"),
    ],
)
def test_what_would_normalise_is_not_left_out(content, names, tmp_path):
    for normalize in ("none", "cifar10"):
        assert f"not read, {names}" in refusal(content, tmp_path, normalize=normalize)


def test_settings_and_results_are_no_normalisation(tmp_path):
    beside = {
        "args": argparse.Namespace(sigma=0.25, mu=7, noise_mean=0.0, noise_std=0.1, mean=None, std=None),
        "results": {"acc_mean": 0.9, "acc_std": np.float64(0.01), "mean": [0.5] * 9},
        "optimizer": {"state": {0: {"mu": torch.rand(8, 3, 3, 3), "sigma": torch.rand(8, 3, 3, 3)}}},
    }
    net, lines = load({"state_dict": RAW, **beside}, tmp_path)
    assert holds(net, RAW) and lines == []
    net, lines = load({"step": torch.tensor(3), **weights(0, "net."), "fc2.weight": torch.rand(4, 9)}, tmp_path)
    assert holds(net, RAW) and len(lines) == 1 and "step, fc2.weight left out" in lines[0]


def test_a_mean_without_a_deviation_is_no_normalisation(tmp_path):
    assert "unknown tensors, such as mean" in refusal({**RAW, "mean": torch.rand(3)}, tmp_path)


# -- refusals -----------------------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return pathlib.Path.touch, (self.file,)


class Evaluating:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return eval, (f"open({str(self.file)!r}, 'w')",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind, name", [(Malicious, "getattr"), (Evaluating, "eval")])
def test_no_code_of_a_file_runs(kind, name, zipped, tmp_path):
    content = {"state_dict": RAW, "x": kind(tmp_path / "written")}
    torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UsageError, match=f"cannot be read: it holds more than tensors, {name},"):
        read_weights(tmp_path / "file.pt")
    assert not (tmp_path / "written").exists()


def test_a_plain_pickle_runs_no_code(tmp_path):
    (tmp_path / "file.pt").write_bytes(pickle.dumps({"state_dict": Evaluating(tmp_path / "written")}))
    with pytest.raises(UsageError):
        read_weights(tmp_path / "file.pt")
    assert not (tmp_path / "written").exists()


def test_a_file_with_objects_names_the_first_and_the_remedy(tmp_path):
    for content, name in ((classifier(0), "fastafd.models.resnet.ResNet"), ({"a": RAW, "b": np.sin}, "sin")):
        torch.save(content, tmp_path / "file.pt")
        with pytest.raises(UsageError) as error:
            read_weights(tmp_path / "file.pt")
        assert name in str(error.value) and "torch.save(model.state_dict(), FILE)" in str(error.value)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_programs_and_newer_pickles_are_named(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    torch.save(RAW, tmp_path / "newer.pt", pickle_protocol=4)
    for file, words in (("script.pt", "TorchScript"), ("newer.pt", "pickle_protocol")):
        with pytest.raises(UsageError, match=words):
            read_weights(tmp_path / file)


def test_the_content_says_which_format_it_is(tmp_path):
    for name in ("a.pt", "a.bin", "a.SAFETENSORS"):
        save_file({name: value.contiguous() for name, value in RAW.items()}, tmp_path / name)
    torch.save(RAW, tmp_path / "b.safetensors")
    for name in ("a.pt", "a.bin", "a.SAFETENSORS", "b.safetensors"):
        fit_weights(net := classifier(9), read_weights(tmp_path / name), lambda line: pytest.fail(line))
        assert holds(net, RAW)


def saved_as(protocol: int, zipped: bool):
    return lambda file: torch.save(RAW, file, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)


@pytest.mark.parametrize(
    "write, words",
    [
        (lambda file: file.write_bytes(b""), "it is empty"),
        (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
        (lambda file: file.write_text("\n<!DOCTYPE html>"), "a page of HTML"),
        (lambda file: file.write_bytes(gzip.compress(b"abc")), "compressed by gzip"),
        (lambda file: np.savez(file.open("wb"), a=np.ones(3)), "an archive of numpy arrays"),
        (lambda file: zipfile.ZipFile(file, "w").writestr("model.pt", "abc"), "a zip archive of other files"),
        (lambda file: file.write_bytes(pickle.dumps({"a": 1}, protocol=2)), "a plain pickle"),
        *((saved_as(protocol, zipped), "another pickle_protocol") for protocol in (0, 1) for zipped in (True, False)),
    ],
)
def test_other_files_are_named(write, words, tmp_path):
    write(tmp_path / "file.pt")
    with pytest.raises(UsageError, match=f"cannot be read: .*{words}"):
        read_weights(tmp_path / "file.pt")


@pytest.mark.parametrize("name", ["file.pt", "file.safetensors"])
def test_a_file_that_may_not_be_opened(name, tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied")

    (tmp_path / name).write_bytes(b"abc")
    monkeypatch.setattr(pathlib.Path, "open", denied)
    with pytest.raises(UsageError, match=f"{name} cannot be opened: Permission denied"):
        read_weights(tmp_path / name)


@pytest.mark.parametrize("value, name", [(frozenset([1]), "frozenset"), (decimal.Decimal(1), "decimal.Decimal")])
def test_other_objects_are_named_and_not_accused(value, name, tmp_path):
    torch.save({"model": RAW, "x": value}, tmp_path / "file.pt")
    with pytest.raises(UsageError, match=rf"tensors, {name}, which is not read; save the weights anew: torch\.save"):
        read_weights(tmp_path / "file.pt")


@pytest.mark.parametrize("form", ["zip", "old", "safetensors"])
def test_damage_is_one_line(form, tmp_path):
    """Truncated anywhere, or with other bytes: read, or refused, without another exception."""
    file = tmp_path / ("good.safetensors" if form == "safetensors" else "good.pt")
    if form == "safetensors":
        save_model(file, classifier(0), {"arch": ARCH})
    else:
        content = {**BESIDE["numpy scalars"], **BESIDE["arguments"], "state_dict": RAW}
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    data, draw = file.read_bytes(), random.Random(0)
    for index in range(120):
        damaged = bytearray(data[: draw.randrange(len(data))] if index % 3 == 0 else data)
        for _ in range(0 if index % 3 == 0 else draw.choice([1, 3])):
            damaged[draw.randrange(draw.choice([len(data), 3000]))] = draw.randrange(256)
        file.write_bytes(damaged)
        try:
            fit_weights(classifier(9), read_weights(file), lambda _: None)
        except UsageError as error:
            assert str(error).startswith("weights: ")


@pytest.mark.parametrize(
    "content, words",
    [
        ({"epoch": 3}, ["no state dict"]),
        ([1, {"a": "b"}], ["no state dict"]),
        (weights(0) | {"more": torch.rand(2)}, ["1 unknown tensors, such as more"]),
        ({k: v for k, v in RAW.items() if k != "conv1.weight"}, ["1 missing tensors, such as conv1.weight"]),
        ({"state_dict": build_model("wrn10_2", 4).state_dict()}, ["in state_dict", "missing", "unknown"]),
        (classifier(0, classes=7).state_dict(), ["7 classes in the file, takes 4"]),
        (build_model("resnet8", 4).state_dict(), ["conv1.weight is (16, 3, 3, 3), takes (8, 3, 3, 3)"]),
        (RAW | {"conv1.weight": torch.full((8, 3, 3, 3), torch.nan)}, ["not finite, in conv1.weight"]),
        (RAW | {"conv1.weight": torch.full((8, 3, 3, 3), 1e300, dtype=torch.float64)}, ["not finite, in conv1.weight"]),
        (RAW | {"bn1.running_var": -torch.ones(8)}, ["variances below 0, in bn1.running_var"]),
        (RAW | {"conv1.weight": torch.ones(8, 3, 3, 3, dtype=torch.int8)}, ["torch.int8, takes torch.float32"]),
        (RAW | {"linear.weight": RAW["linear.weight"].to_sparse()}, ["1 missing tensors, such as linear.weight"]),
        ({"a": weights(0) | {"x": torch.rand(2)}, "b": {"conv1.weight": torch.rand(3)}}, ["in a", "such as x"]),
    ],
)
def test_what_does_not_fit_is_named(content, words, tmp_path):
    line = refusal(content, tmp_path)
    assert all(word in line for word in words), line


@pytest.fixture
def files(tmp_path):
    """A good file of weights, and files with one fault each."""
    state = build_model("resnet8", 10).state_dict()
    torch.save(state, tmp_path / "good.pt")
    data = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "truncated.pt").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "folder.pt").mkdir()
    torch.save({"epoch": 3}, tmp_path / "foreign.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    torch.save(build_model("resnet8", 7).state_dict(), tmp_path / "seven.pt")
    torch.save(build_model("wrn10_2", 10).state_dict(), tmp_path / "wrn.pt")
    torch.save(build_model("resnet8", 10, "cifar10").state_dict(), tmp_path / "normalized.pt")
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "good.safetensors")
    safe = (tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "truncated.safetensors").write_bytes(safe[: len(safe) // 2])
    about = {"arch": "resnet8", "num_classes": 10, "normalize": "none", "classes": list("9876543210")}
    save_model(tmp_path / "reversed.safetensors", build_model("resnet8", 10), about)
    save_model(tmp_path / "wrn.safetensors", build_model("wrn10_2", 10), about | {"arch": "wrn10_2"})
    return tmp_path


EARLY = [  # found before an image is read
    ("missing.pt", ["missing.pt"]),
    ("truncated.pt", ["truncated.pt", "truncated"]),
    ("text.pt", ["text.pt"]),
    ("empty.pt", ["empty.pt"]),
    ("folder.pt", ["folder.pt"]),
    ("foreign.pt", ["foreign.pt", "state dict"]),
    ("module.pt", ["module.pt", "torch.nn.modules.linear.Linear", "torch.save(model.state_dict(), FILE)"]),
    ("truncated.safetensors", ["truncated.safetensors"]),
    ("wrn.safetensors", ["--arch wrn10_2, takes --arch resnet8"]),
]
LATE = [
    ("seven.pt", ["7 classes in the file, takes 10"]),
    ("wrn.pt", ["wrn.pt", "does not fit", "missing"]),
    ("normalized.pt", ["--normalize cifar10"]),
    ("reversed.safetensors", ["holds the classes 9, 8,", "takes 0, 1,"]),
]


@pytest.mark.parametrize("file, words", EARLY + LATE)
def test_the_verbs_say_what_is_wrong(files, file, words, capsys):
    where = ["--data-dir", files / "no images"] if (file, words) in EARLY else []
    data = ["--dataset", "imagefolder" if where else "digits", *where]
    for main, flag, argv in (
        (evaluate_main, "weights", ["--arch", "resnet8", *data]),
        (train.main, "pretrained", ["--recipe", "digits", "--arch", "resnet8", *data]),
    ):
        line = line_of(main, [*argv, f"--{flag}", files / file], capsys)
        assert line.startswith(f"error: {flag}: ") and all(word in line for word in words), line


# -- files of fastafd ---------------------------------------------------------------------------------------------


def test_saved_classifiers_load_back_and_strictly(tmp_path):
    net = build_model("wrn10_2", 10, "cifar100").eval()
    about = {"arch": "wrn10_2", "num_classes": 10, "normalize": "cifar100", "image_size": 32}
    save_model(tmp_path / "model.safetensors", net, about)
    x = torch.rand(2, 3, 32, 32)
    for path in (tmp_path, str(tmp_path / "model.safetensors")):
        loaded = fastafd.load_model(path)
        assert not loaded.training
        torch.testing.assert_close(loaded(x), net(x), rtol=0, atol=0)


def test_a_normalisation_of_its_own_is_saved_and_read(tmp_path):
    net, _ = load(normalised(LAYERS[0], ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))), tmp_path, "cifar10")
    save_model(tmp_path / "model.safetensors", net, {"arch": ARCH, "num_classes": CLASSES, "normalize": "cifar10"})
    assert fastafd.load_model(tmp_path).normalize.std.flatten().tolist() == pytest.approx([0.2] * 3)


GOOD = {"arch": ARCH, "num_classes": CLASSES, "normalize": "none", "classes": list("abcd")}


def saved(folder, header):
    """A file with this header, a dict or any text."""
    tensors = {name: value.contiguous() for name, value in RAW.items()}
    metadata = {"fastafd": header if isinstance(header, str) else json.dumps(header)}
    save_file(tensors, folder / "model.safetensors", metadata=metadata)
    return folder / "model.safetensors"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"arch": "wrn10_2"}, "--arch wrn10_2, takes --arch resnet8_half"),
        ({"normalize": "cifar10"}, "--normalize cifar10, takes --normalize none"),
        ({"classes": list("wxyz")}, "holds the classes w, x, y, z, takes a, b, c, d"),
        ({"classes": list("abdc")}, "holds the classes a, b, d, c, takes a, b, c, d"),
        ({"classes": list("abcde"), "num_classes": 5}, "5 classes, takes 4"),
        ({"classes": None, "num_classes": 5}, "5 classes, takes 4"),
        ({"image_size": 64}, ""),
        ({"classes": None}, ""),
        ({"arch": None, "num_classes": None, "normalize": None, "classes": None}, ""),
    ],
)
def test_a_header_must_agree_with_the_task(change, words, tmp_path):
    read = read_weights(saved(tmp_path, GOOD | change), "pretrained")
    try:
        check_classifier(read, ARCH, "none")
        check_classes(read, tuple("abcd"))
        line = ""
    except UsageError as error:
        line = str(error)
    assert words in line and line.startswith("pretrained: " if words else "") and bool(words) == bool(line)


def test_many_classes_are_not_listed(tmp_path):
    names = [f"c{i}" for i in range(100)]
    read = read_weights(saved(tmp_path, {"classes": names}))
    with pytest.raises(UsageError, match="its class 98 is c98, takes c99"):
        check_classes(read, [*names[:98], "c99", "c98"])


@pytest.mark.parametrize(
    "header",
    [
        "{",
        "[1]",
        "3",
        "[" * 100_000,
        *(GOOD | change for change in [{"arch": 3}, {"normalize": []}, {"num_classes": "4"}, {"num_classes": True}]),
        *(GOOD | change for change in [{"num_classes": 0}, {"num_classes": 10**12}, {"num_classes": 3}]),
        *(GOOD | change for change in [{"classes": "abcd"}, {"classes": [1, 2, 3, 4]}, {"dataset": {}}]),
        *(GOOD | change for change in [{"pretraining_seconds": "long"}]),
    ],
    ids=str,
)
def test_headers_of_foreign_hands(header, tmp_path, capsys):
    file = saved(tmp_path, header)
    for main, flag, argv in (
        (evaluate_main, "weights", ["--arch", ARCH, "--dataset", "digits"]),
        (evaluate_main, "model", ["--dataset", "digits"]),
        (train.main, "pretrained", ["--recipe", "digits", "--arch", ARCH]),
    ):
        line = line_of(main, [*argv, f"--{flag}", file], capsys)
        assert line.startswith(f"error: {flag}: ") and "header" in line


@pytest.mark.parametrize("change", [{"arch": None}, {"normalize": None}, {"arch": "wrn" + "9" * 5000 + "_1"}])
def test_a_header_that_describes_no_classifier(change, tmp_path, capsys):
    line = line_of(evaluate_main, [saved(tmp_path, GOOD | change), "--dataset", "digits"], capsys)
    assert line.startswith("error: model: ")


def test_evaluate_refuses_what_it_would_ignore(tmp_path, capsys):
    file = saved(tmp_path, GOOD | {"dataset": "letters"})
    for flags, words in (
        (["--normalize", "cifar10"], "normalize: "),
        (["--normalize", "none"], "normalize: "),
        (["--dataset", "digits"], "dataset: "),  # of other classes
    ):
        line = line_of(evaluate_main, [file, "--dataset", "digits", *flags], capsys)
        assert line.startswith(f"error: {words}"), line
    for flags in (["--arch", "resnet8"], ["--arch", ARCH, "--normalize", "cifar10"]):
        argv = ["--weights", file, "--dataset", "imagefolder", "--data-dir", tmp_path / "none", *flags]
        assert line_of(evaluate_main, argv, capsys).startswith("error: weights: ")


def test_evaluate_says_what_it_took(tmp_path, capsys):
    torch.save(
        {"net": classifier(0, classes=10).state_dict(), "ema": classifier(1, classes=10).state_dict()},
        tmp_path / "a.pt",
    )
    argv = ["--weights", tmp_path / "a.pt", "--arch", ARCH, "--dataset", "digits", "--attack", "clean", "--n", 10]
    evaluate_main([str(word) for word in argv])
    assert "took net; ema was left" in capsys.readouterr().err
