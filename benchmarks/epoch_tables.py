"""What benchmarks.epoch_time says of what it measured: Markdown tables, and a text below them."""

from __future__ import annotations

from typing import Any

from fastafd.reporting.paper import TABLE5

IMAGES = 50_000  # of an epoch
PAPER = {"afd": TABLE5["AFD"][1], "natural": TABLE5["Standard"][1]}  # s an epoch
# s an epoch of the kernels of a layer-by-layer implementation, by a roofline of the device: a model, not a measurement
LIMIT = {("H100", "resnet18"): 2.2, ("H100", "wrn34_10"): 21.9, ("H200", "resnet18"): 2.0, ("H200", "wrn34_10"): 21.5}


def table(found: dict[str, Any]) -> str:
    """Markdown: every form, the paper and the limit beside them."""
    head = ["network", "task", "form", "s/epoch", "fastest to slowest", "x paper-style", "images/s", "TFLOP/s"]
    head += ["of a product's", "peak GiB", "first call s"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in found["rows"]:
        peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        cells = [row["arch"], row["task"], row["form"], f"{row['epoch_s']:.2f}"]
        cells += [f"{row['fastest_s']:.2f} to {row['slowest_s']:.2f}", f"{row['times_paper_style']:.2f}"]
        cells += [f"{row['images_s']:.0f}", f"{row['tflops']:.2f}", f"{row['of_product']:.0%}", peak]
        lines.append("| " + " | ".join([*cells, f"{row['first_call_s']:.1f}"]) + " |")
    for row in found["whole"]:
        form = f"fast, whole epoch, {row['loader']}"
        cells = [row["arch"], row["task"], form, f"{row['epoch_s']:.2f}"]
        cells += [f"{min(row['all_s']):.2f} to {max(row['all_s']):.2f}", "", f"{row['images_s']:.0f}", "", "", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    for task, seconds in PAPER.items():
        cells = ["resnet18", task, "the paper's Table 5, on an RTX 4090", f"{seconds:.0f}", *7 * [""]]
        lines.append("| " + " | ".join(cells) + " |")
    for (device, arch), seconds in LIMIT.items():
        if device in found["device"]:
            cells = [arch, "afd", f"limit: a roofline model of an {device}", f"{seconds:.1f}", *7 * [""]]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def methods_table(found: dict[str, Any]) -> str:
    """Markdown: every method's seconds of an epoch and in all, those of the paper beside a ResNet-18's."""
    head = ["network", "method", "engine", "epochs", "s/epoch", "fastest to slowest", "s in all"]
    head += ["the paper's s/epoch", "the paper's s in all"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in found["methods"]:
        _, epoch, total = TABLE5[row["method"]]
        paper = [f"{epoch:.0f}", f"{total:.0f}"] if row["arch"] == "resnet18" else ["", ""]
        cells = [row["arch"], row["method"], row["engine"], str(row["epochs"]), f"{row['epoch_s']:.2f}"]
        cells += [f"{row['fastest_s']:.2f} to {row['slowest_s']:.2f}", f"{row['total_s']:.0f}", *paper]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def about(found: dict[str, Any]) -> str:
    """What was measured on what, when and how."""
    said = f"{found['device']}, {found['amp']}, batch {found['batch']}, PGD-{found['pgd_steps']}, "
    said += (
        f"PyTorch {found['torch']}, {found['threads']} CPU threads, {found['date']}. Rows without a loader: the median "
    )
    said += (
        f"of {found['rounds']} rounds of {found['steps']} steps of random pixels, times {IMAGES // found['batch']}. "
    )
    said += f"A matrix product reaches {found['product_tflops']:.3g} TFLOP/s."
    for row in found["phases"]:
        parts = ", ".join(f"{name} {1000 * seconds:.3g}" for name, seconds in row["seconds"].items())
        said += f"\n\nMilliseconds of the parts of a step of the {row['engine']} engine, each alone, {row['arch']}, "
        said += f"{row['task']}: {parts}."
    for row in found["whole"]:
        alone = row["loader_alone_images_s"]
        said += f"\n\nThe {row['loader']} loader alone, {row['arch']}, {row['task']}: {alone:.0f} images/s, "
        said += f"{alone / row['images_s']:.1f} times what the epoch took."
    for row in found["compile"]:
        said += f"\n\nUntil the first AFD step of {row['arch']} is done, compiler caches empty: {row['cold']:.0f} s; "
        said += f"full: {row['warm']:.0f} s."
    if "methods" in found:
        said += (
            "\n\nMethods: an epoch of Free-AT is 8 passes. Seconds in all count epochs alone, without a loader: the "
        )
        said += (
            "recipe's; before vAFT, AFKD, ARREST and AFD those of Standard; before RiFT those of PGD-AT, but not the "
        )
        said += (
            "choice of a module and of a mixture. The paper: Table 5, ResNet-18 on an RTX 4090; it excerpts Free-AT, "
        )
        said += "FGSM-GA and ATAS from Huang et al. (2023)."
    return said
