"""Tables from run folders: which runs belong to a row of the paper, several seeds, rows without runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT

from fastafd import report
from fastafd.evaluation import wilson
from fastafd.reporting import paper
from fastafd.reporting.markdown import markdown
from fastafd.reporting.runs import read_runs
from fastafd.reporting.tables import parameters, results, table1, table2, table3, table4, table6
from fastafd.settings import UsageError


def printed(table, runs) -> str:
    """The Markdown of a table function for these runs."""
    return markdown(table(runs))


def figure(accuracy: float, n: int = 10_000) -> dict:
    correct = round(accuracy * n)
    return {"n": n, "correct": correct, "accuracy": correct / n, "interval": wilson(correct, n)}


def write_run(folder: Path, label: str, recipe: str, figures: tuple[float, ...], **more) -> Path:
    """A finished run folder with the parts that tables read."""
    arch, dataset, train = (
        more.get(key, other) for key, other in (("arch", "resnet18"), ("dataset", "cifar10"), ("train", 50_000))
    )
    eps = {"eps": more.get("eps", "8/255")}
    attacks = eps | dict(zip(("clean", "pgd20", "autoattack"), map(figure, figures)))
    models = {label: attacks}
    if more.get("begins", "natural") == "natural":
        models["natural"] = eps | {"clean": figure(more.get("natural", 0.946)), "pgd20": figure(0.0)}
    if label == "AFD":
        models["AFD, f2"] = {"clean": figure(0.4)}
    result = {
        "label": label,
        "models": models,
        "dataset": {"name": dataset, "train": train, "test": 10_000, "classes": ["a", "b"]},
        "changed": more.get("changed", {}),
        "amp": "fp32",
        "parameters": {"model": 11_173_962, "training": 11_173_962 + (2 * 512**2 if label == "AFD" else 0)},
        "seconds": {"finetuning": {"wall": 80.0}, "pretraining": None if more.get("pretrained") else 40.0},
        "config": {
            "recipe": recipe,
            "matched": more.get("matched", False),
            "pretrained": more.get("pretrained"),
            "task": {"arch": arch, "dataset": dataset, "seed": more.get("seed", 0)},
            "method": {"held_out": 1000} if label == "RiFT" else {"gamma": 25.0} if label == "AFD" else {},
        },
    }
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "metrics.jsonl").write_text("")
    return folder


def row(table: str, first: str) -> list[str]:
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith(f"| {first} |")]
    assert lines, f"no row {first} in\n{table}"
    return lines[0]


def test_nothing_run_is_shown_as_not_run(tmp_path):
    runs = read_runs([write_run(tmp_path / "x", "AFD", "released", (0.8, 0.5, 0.4), arch="resnet8")])
    for table in (
        printed(table1, runs),
        printed(table2, runs),
        printed(table3, runs),
        printed(table4, runs),
    ):
        cells = [cell for line in table.splitlines()[4:] for cell in line.strip("| ").split(" | ") if "paper" in cell]
        assert cells and all(cell.startswith("not run; paper") for cell in cells)
    assert "not run; paper 94.60" in printed(table6, runs)


def test_a_run_beside_the_paper(tmp_path):
    runs = read_runs([write_run(tmp_path / "afd", "AFD", "released", (0.85, 0.52, 0.46))])
    assert row(printed(table1, runs), "AFD")[1:] == [
        "85.00 [84.3, 85.7] n=10000; paper 84.88, +0.12",
        "52.00 [51.0, 53.0] n=10000; paper 52.70, -0.70",
        "46.00 [45.0, 47.0] n=10000; paper 47.40, -1.40",
        "61.00; paper 61.66, -0.66",
    ]
    (line,) = [line for line in printed(table4, runs).splitlines() if line.startswith("| AFD | resnet18 | cifar10 |")]
    assert "85.00" in line and "40.00" in line and "| 45.00; paper 45.83 |" in line
    of_natural = "| resnet18 | cifar10 | own, seed 0 | 94.60 [94.1, 95.0] n=10000; paper 94.60, +0.00 |"
    assert of_natural in printed(table6, runs)
    assert row(printed(parameters, runs), "resnet18")[1:] == [
        "11,173,962",
        "524,288",
        "4.69 %",
        "11.2 M + 0.5 M, 4.46 %",
    ]


def test_seeds_are_one_row_of_mean_and_deviation(tmp_path):
    for seed, clean in enumerate((0.84, 0.85, 0.86)):
        write_run(tmp_path / f"afd-{seed}", "AFD", "released", (clean, 0.5, 0.4), seed=seed)
    runs = read_runs([tmp_path])
    assert row(printed(table1, runs), "AFD")[1] == "85.00 ± 1.00 of 3 seeds, n=10000; paper 84.88, +0.12"
    assert row(printed(results, runs), "AFD")[6] == "58.33 ± 0.33" and printed(results, runs).count("| AFD |") == 1


def test_natural_models_that_runs_began_with(tmp_path):
    """A natural model counts once for each seed, for any number of runs.

    Other weights and networks have their own row.
    """
    for seed, natural in enumerate((0.94, 0.96)):
        write_run(tmp_path / f"afd-{seed}", "AFD", "released", (0.85, 0.5, 0.4), seed=seed, natural=natural)
    short = {"changed": {"epochs": 2}, "natural": 0.94}
    write_run(tmp_path / "vaft", "vAFT", "vaft", (0.85, 0.5, 0.4), **short)
    write_run(tmp_path / "given", "AFD", "released", (0.85, 0.5, 0.4), pretrained="runs/example", natural=0.93)
    write_run(tmp_path / "pgd_at", "PGD-AT", "pgd_at", (0.85, 0.5, 0.4), begins="scratch")
    write_run(tmp_path / "wide", "AFD", "released", (0.85, 0.5, 0.4), arch="wrn34_10", natural=0.97)
    lines = printed(results, read_runs([tmp_path])).splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| Natural |")]
    assert [(line[1], line[3][:12], *line[7:]) for line in rows] == [
        ("resnet18", "95.00 ± 1.41", "40"),
        ("resnet18", "93.00 [92.5,", "not known", "pretrained example"),
        ("wrn34_10", "97.00 [96.6,", "40"),
    ]
    assert [line.startswith("| Natural |") for line in lines[2:]].index(True) == 0


@pytest.mark.parametrize(
    "more, why",
    [({"changed": {"epochs": 2}}, "epochs 2"), ({"train": 10_000}, "10000 images of cifar10")],
)
def test_other_settings_and_parts_of_a_data_set_are_no_rows_of_the_paper(more, why, tmp_path):
    folder = write_run(tmp_path / "small", "AFD", "released", (0.85, 0.52, 0.46), **more)
    runs = read_runs([folder])
    for table in (printed(table1, runs), printed(table3, runs), printed(table4, runs)):
        assert "85.00" not in table and f"- {folder}: {why}" in table
    assert "85.00" in printed(results, runs)


def test_held_out_and_evaluated_images_do_not_make_other_settings(tmp_path):
    write_run(tmp_path / "rift", "RiFT", "rift", (0.84, 0.49, 0.43), train=49_000, begins="robust")
    write_run(tmp_path / "afd", "AFD", "released", (0.85, 0.52), changed={"autoattack_n": 0})
    table = printed(table1, read_runs([tmp_path]))
    assert row(table, "RiFT")[1].startswith("84.00") and "Left out" not in table
    assert row(table, "AFD")[3:] == ["not run; paper 47.40", "not run; paper 61.66"]


def test_ablation_and_matched_runs_have_rows_of_their_own(tmp_path):
    write_run(tmp_path / "a", "AFD", "vaft_d", (0.81, 0.5, 0.4))
    write_run(tmp_path / "b", "AFD", "vaft_a", (0.82, 0.5, 0.4))
    write_run(tmp_path / "c", "vAFT", "vaft", (0.83, 0.5, 0.4), matched=True)
    write_run(tmp_path / "d", "vAFT", "vaft", (0.84, 0.5, 0.4))
    table = printed(table3, read_runs([tmp_path]))
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[1][:5] for line in table.splitlines()[2:6]}
    assert cells == {"vAFT": "84.00", "vAFT (matched)": "83.00", "vAFT+D": "81.00", "vAFT+A": "82.00"}
    assert row(printed(table1, read_runs([tmp_path])), "vAFT (matched)")[1].startswith("83.00")


def test_autoattack_by_evaluation_later_counts(tmp_path):
    folder = write_run(tmp_path / "afd", "AFD", "released", (0.85, 0.52))
    (folder / "evaluation-autoattack.json").write_text(
        json.dumps({"dataset": "cifar10", "eps": "8/255", "autoattack": figure(0.47, 1000)})
    )
    assert row(printed(table1, read_runs([folder])), "AFD")[3].startswith("47.00 [43.9, 50.1] n=1000; paper 47.40")
    whole = write_run(tmp_path / "whole", "AFD", "released", (0.85, 0.52, 0.46))
    for dataset, eps, n, expected in (
        ("cifar10", "8/255", 1000, 0.46),
        ("cifar100", "8/255", 10_000, 0.46),
        ("cifar10", "4/255", 10_000, 0.46),
        ("cifar10", "8/255", 10_000, 0.47),
    ):
        (whole / "evaluation-autoattack.json").write_text(
            json.dumps({"dataset": dataset, "eps": eps, "autoattack": figure(0.47, n)})
        )
        (run,) = read_runs([whole])
        assert run.trained["autoattack"]["accuracy"] == expected  # the one with more images, and the run's own


def test_models_attacked_within_another_eps_are_rows_of_their_own(tmp_path):
    for seed, eps in ((0, "8/255"), (1, "4/255")):
        write_run(tmp_path / eps[0], "AFD", "released", (0.85, 0.5), eps=eps, seed=seed)
    lines = printed(results, read_runs([tmp_path])).splitlines()
    for name in ("Natural", "AFD"):
        rows = [line for line in lines if line.startswith(f"| {name} |")]
        assert len(rows) == 2 and all(any(f"eps {eps}" in line for line in rows) for eps in ("4/255", "8/255"))


def test_only_seeds_are_averaged(tmp_path):
    """Sweeps, other starting weights, other recipes and a repeated seed do not count as seeds of the published row."""
    write_run(tmp_path / "released-seed0", "AFD", "released", (0.80, 0.5, 0.4))
    write_run(tmp_path / "again", "AFD", "released", (0.80, 0.5, 0.4))
    write_run(tmp_path / "gamma-25-seed0", "AFD", "released", (0.10, 0.5, 0.4))
    write_run(tmp_path / "digits", "AFD", "digits", (0.20, 0.5, 0.4))
    write_run(tmp_path / "paper", "AFD", "paper", (0.30, 0.5, 0.4))
    write_run(tmp_path / "example", "AFD", "released", (0.90, 0.5, 0.4), pretrained="example")
    runs = read_runs([tmp_path, tmp_path / "again"])
    assert len(runs) == 6
    table = printed(table1, runs)
    assert row(table, "AFD")[1].startswith("80.00 [") and row(table, "AFD, from example")[1].startswith("90.00 [")
    assert row(table, "AFD (paper)")[1].startswith("30.00 [") and row(table, "AFD (digits)")[1].startswith("20.00 [")
    for name in ("gamma-25-seed0: of a sweep", "released-seed0: of a network"):  # `again` is the first of seed 0
        assert f"- {tmp_path}/{name}" in table
    for of_paper in (printed(table3, runs), printed(table4, runs)):
        assert "30.00" in of_paper and "10.00 [" not in of_paper


def test_unfinished_folders_are_passed_over(tmp_path):
    folder = write_run(tmp_path / "afd", "AFD", "released", (0.85, 0.52, 0.46))
    (tmp_path / "begun").mkdir()
    assert [run.folder for run in read_runs([folder, tmp_path / "begun", folder])] == [folder]
    with pytest.raises(UsageError, match=r"no finished run in .*begun"):
        read_runs([tmp_path / "begun"])


def test_figures_of_the_paper_are_what_its_text_says():
    """A wrong number shows, because the paper prints averages beside the numbers."""
    text = next((ROOT.parent / "shared" / "paper").glob("001_*.txt"), None)
    if text is None:
        pytest.skip("the paper's text is not beside the checkout")
    lines = text.read_text().replace("<u>", "").replace("</u>", "").splitlines()
    for arch, first in (("resnet18", "PGD-AT\t84.43"), ("wrn34_10", "PGD-AT\t86.35")):
        start = next(index for index, line in enumerate(lines) if line.startswith(first))
        rows = {}
        for line in lines[start : start + 10]:
            name, *values = line.split("\t")
            rows[name.split(" <")[0].replace("$ATAS^{\\dagger}$", "ATAS")] = values
        for index, dataset in enumerate(("cifar10", "cifar100", "tiny-imagenet")):
            for method, figures in paper.ACCURACY[arch][dataset].items():
                assert [f"{value:.2f}" for value in figures] == rows[method][4 * index : 4 * index + 3]
                assert sum(figures) / 3 == pytest.approx(float(rows[method][4 * index + 3]), abs=0.015)
    assert paper.ABLATION["AFD"] == paper.ACCURACY["resnet18"]["cifar10"]["AFD"]
    for method, (epochs, one, total) in paper.TABLE5.items():
        begins = 590 if method in ("vAFT", "AFKD", "ARREST", "AFD") else 4440 if method == "RiFT" else 0
        assert total == pytest.approx(begins + epochs * one, rel=0.02)


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "got nothing to report, takes one of results, table1"),
        (["table9", "HERE"], "takes one of results, table1, .*did you mean table"),
        (["table1", "nowhere"], "runs: got nowhere, takes a run folder"),
        (["figure3", "HERE"], "is disentangled"),
        (["table1", "HERE", "--outt", "x"], "did you mean --out"),
    ],
)
def test_mistakes(words, message, tmp_path):
    folder = write_run(tmp_path / "vaft", "vAFT", "vaft", (0.8, 0.5, 0.4))
    with pytest.raises(UsageError, match=message):
        report.main([str(folder) if word == "HERE" else word for word in words])
