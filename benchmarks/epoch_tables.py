"""The Markdown tables of benchmarks.epoch_time, and the text below them."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.clock import RESULTS
from benchmarks.limits import share
from fastafd.reporting.markdown import markdown_table
from fastafd.reporting.paper import TABLE5

IMAGES = 50_000  # of an epoch
PAPER = {"afd": TABLE5["AFD"][1], "natural": TABLE5["Standard"][1]}  # s an epoch
ROOFLINES = ("resnet18", "wrn34_10")  # networks with a file of `benchmarks.generated`, which is for an H100


def roofline_seconds(arch: str) -> float:
    """Seconds of an AFD epoch by the roofline of the generated code, from results/generated-ARCH.json."""
    result = json.loads((RESULTS / f"generated-{arch.replace('_', '-')}.json").read_text())
    (row,) = [row for row in result["rows"] if row["method"] == "released"]
    model = row["models"][0]  # without a cache, without a floor for launches
    return model["step_ms"] * model["steps"] / 1e3


def epoch_table(result: dict[str, Any]) -> str:
    """Markdown: every form, then the paper's seconds, then the roofline on the GPU that it is for."""
    head = ["network", "task", "form", "s/epoch", "fastest to slowest", "x paper-style", "images/s", "TFLOP/s"]
    head += ["of the peak" if "peak_tflops" in result else "of a product's", "peak GiB", "first call s"]
    lines = []
    for row, of_limit in zip(result["rows"], shares(result), strict=True):
        peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        cells = [row["arch"], row["task"], row["form"], f"{row['epoch_s']:.2f}"]
        cells += [f"{row['fastest_s']:.2f} to {row['slowest_s']:.2f}", f"{row['times_paper_style']:.2f}"]
        cells += [f"{row['images_s']:.0f}", f"{row['tflops']:.2f}", of_limit, peak]
        lines.append([*cells, f"{row['first_call_s']:.1f}"])
    for row in result["whole"]:
        cells = [row["arch"], row["task"], f"fast, whole epoch, {row['loader']}", f"{row['epoch_s']:.2f}"]
        cells += [f"{min(row['all_s']):.2f} to {max(row['all_s']):.2f}", "", f"{row['images_s']:.0f}", "", "", "", ""]
        lines.append(cells)
    for task, seconds in PAPER.items():
        lines.append(["resnet18", task, "the paper's Table 5, on an RTX 4090", f"{seconds:.0f}", *7 * [""]])
    if "H100" in result["device"]:
        for arch in ROOFLINES:
            form = "roofline of the generated code, benchmarks.generated"
            lines.append([arch, "afd", form, f"{roofline_seconds(arch):.2f}", *7 * [""]])
    return markdown_table(head, lines)


def shares(result: dict[str, Any]) -> list[str]:
    """The share of the peak that each row reaches, in old files of a product's rate; all empty if one is above 100 %.

    What one row exceeded is no limit, so it says nothing of the others.
    """
    parts = [row["of_peak"] if "peak_tflops" in result else row["of_product"] for row in result["rows"]]
    return [share(part) if max(parts) <= 1 else "" for part in parts]


def limit_note(result: dict[str, Any]) -> str:
    """The sentence on the rate that the rows are compared with: the peak, in old files that of a product."""
    if "peak_tflops" in result:
        said = f"The peak, the fastest product or convolution measured, is {result['peak_tflops']:.3g} TFLOP/s"
        said += f" ({result['peak_by']})."
    else:
        said = f"A matrix product reaches {result['product_tflops']:.3g} TFLOP/s."
    exceeded = result["rows"] and not any(shares(result))
    return f"{said} A form was faster, so no share of it is shown." if exceeded else said


def methods_table(result: dict[str, Any]) -> str:
    """Markdown: the seconds of each method's epoch and of its whole training, beside the paper's for ResNet-18."""
    head = ["network", "method", "engine", "epochs", "s/epoch", "fastest to slowest", "s in all"]
    head += ["the paper's s/epoch", "the paper's s in all"]
    lines = []
    for row in result["methods"]:
        _, epoch, total = TABLE5[row["method"]]
        paper = [f"{epoch:.0f}", f"{total:.0f}"] if row["arch"] == "resnet18" else ["", ""]
        cells = [row["arch"], row["method"], row["engine"], str(row["epochs"]), f"{row['epoch_s']:.2f}"]
        lines.append([*cells, f"{row['fastest_s']:.2f} to {row['slowest_s']:.2f}", f"{row['total_s']:.0f}", *paper])
    return markdown_table(head, lines)


def epoch_note(result: dict[str, Any]) -> str:
    """The text below the tables: device, version, date, how rows were measured, parts of a step, loaders, compiling."""
    paragraphs = [
        f"{result['device']}, {result['amp']}, batch {result['batch']}, PGD-{result['pgd_steps']}, "
        f"PyTorch {result['torch']}, {result['threads']} CPU threads, {result['date']}. "
        f"Rows without a loader: the median of {result['rounds']} rounds of {result['steps']} steps of random pixels, "
        f"times {IMAGES // result['batch']}. {limit_note(result)}"
    ]
    for row in result["phases"]:
        parts = ", ".join(f"{name} {1000 * seconds:.3g}" for name, seconds in row["seconds"].items())
        paragraphs.append(
            f"Milliseconds of the parts of a step of the {row['engine']} engine, each alone, {row['arch']}, "
            f"{row['task']}: {parts}."
        )
    for row in result["whole"]:
        alone = row["loader_alone_images_s"]
        paragraphs.append(
            f"The {row['loader']} loader alone, {row['arch']}, {row['task']}: {alone:.0f} images/s, "
            f"{alone / row['images_s']:.1f} times what the epoch took."
        )
    for row in result["compile"]:
        paragraphs.append(
            f"Until the first AFD step of {row['arch']} is done, compiler caches empty: {row['cold']:.0f} s; "
            f"full: {row['warm']:.0f} s."
        )
    if "methods" in result:
        paragraphs.append(
            "Methods: an epoch of Free-AT is 8 passes. Seconds in all count epochs alone, without a loader: the "
            "recipe's; before vAFT, AFKD, ARREST and AFD those of Standard; before RiFT those of PGD-AT, but not the "
            "choice of a module and of a mixture. The paper: Table 5, ResNet-18 on an RTX 4090; it excerpts Free-AT, "
            "FGSM-GA and ATAS from Huang et al. (2023)."
        )
    return "\n\n".join(paragraphs)
