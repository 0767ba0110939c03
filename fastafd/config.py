"""The settings of a run: frozen dataclasses in which every field has a sentence with its unit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastafd.attacks import Ball
from fastafd.methods import Method
from fastafd.settings import check, choice, lr_steps, number, optional, part, path, setting, switch, text, weights_file


@dataclass(frozen=True)
class Task:
    """The classifier, the images and the device."""

    arch: str = setting(
        "resnet18", "classifier: resnet18, resnet50, preactresnet18, wrn34_10 (any wrnN_K), resnet8, resnet8_half", text
    )
    dataset: str = setting("cifar10", "cifar10, cifar100, tiny-imagenet, imagefolder or digits", text)
    data_dir: Path = setting(Path("data"), "folder that holds the data set, or an image tree of its classes", path)
    image_size: int | None = setting(
        None, "side in pixels that an image folder or digits are resized to", optional(number(8, 1024, whole=True))
    )
    skip_bad_images: bool = setting(
        False, "leave out image files that cannot be decoded or have another size, and list them", switch
    )
    normalize: str = setting("none", "normalisation layer inside the model: none, cifar10, cifar100 or imagenet", text)
    loader: str = setting("ffcv", "loader of the batches", choice("ffcv", "resident", "torch"))
    device: str = setting("auto", "cpu, cuda, cuda:N, or auto: a GPU if there is one", text)
    amp: str = setting(
        "auto",
        "arithmetic of the forward passes; auto: bf16 on a GPU that has it, else fp32 (convolutions there in TF32)",
        choice("auto", "bf16", "fp16", "fp32"),
    )
    engine: str = setting(
        "auto",
        "fast (compiled, on a GPU one graph a step), reference (plain PyTorch), or auto: fast on a GPU",
        choice("auto", "fast", "reference"),
    )
    threads: int | None = setting(
        None, "threads of the CPU; default: as many as the network is worth", optional(number(1, 1024, whole=True))
    )
    seed: int = setting(
        0,
        "seed of the order of the images, the augmentation, the attack's starts and fresh weights",
        number(0, 2**32, whole=True),
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum over a number of epochs."""

    epochs: int = setting(20, "passes over the training images", number(0, whole=True))
    batch_size: int = setting(128, "images a step", number(1, whole=True))
    lr: float = setting(0.025, "initial learning rate", number(0))
    lr_schedule: tuple[tuple[float, float], ...] = setting(
        ((0.0, 1.0),), "from a fraction of the run on, lr times a factor: 0:1,0.5:0.8", lr_steps
    )
    lr_between: str = setting(
        "steps",
        "between those fractions lr stays (steps) or goes straight to the next (lines)",
        choice("steps", "lines"),
    )
    momentum: float = setting(0.9, "momentum", number(0, 1))
    weight_decay: float = setting(
        5e-4, "weight decay on every parameter but D2, BatchNorm and biases included", number(0)
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of a whole fine-tuning run. The functions of `fastafd.recipes` return complete ones."""

    recipe: str = setting(
        "released",
        "method and its settings, which other flags change: released, paper, released_cifar100, digits, vaft_d, "
        "vaft_a (AFD), vaft, afkd, arrest, rift, pgd_at, trades, free_at, fgsm_ga or atas",
        text,
    )
    matched: bool = setting(
        False, "another method's recipe with AFD's schedule, weight decay, attack and average (of released)", switch
    )
    task: Task = part(flat=True)
    method: Method = part(flat=True)
    attack: Ball = part()  # a PGD, or only the ball for a method that makes its attacked images itself
    sgd: SGD = part(flat=True)
    pretrain: SGD = part()
    attack_bn: str = setting(
        "eval",
        "BatchNorm during the attack: eval (running statistics) or train (batch statistics, which move the others)",
        choice("eval", "train"),
    )
    d2_weight_decay: float = setting(5e-4, "weight decay on D2", number(0))
    ema_decay: float = setting(
        0.999, "decay of the weight average, min(ema_decay, (1+t)/(10+t)) at update t; 0: no average", number(0, 1)
    )
    pretrained: str | None = setting(
        None,
        "weights to start from: a file, a run folder or 'example'; default: pre-train a natural model (not for rift)",
        optional(weights_file),
    )
    out: Path | None = setting(None, "run folder; default runs/DATE-TIME-DATASET-ARCH-RECIPE", optional(path))
    log_every: int = setting(50, "steps between two lines of metrics.jsonl", number(1, whole=True))
    save_every: int = setting(
        0, "steps between two saves of last.pt within an epoch; 0: save only after each epoch", number(0, whole=True)
    )
    eval_n: int | None = setting(
        None, "test images for clean and PGD-20 accuracy; default all", optional(number(1, whole=True))
    )
    autoattack_n: int = setting(1000, "test images for AutoAttack; 0 leaves it out", number(0, whole=True))

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class PretrainConfig:
    """The settings of a natural pre-training run; the defaults are those of the paper's appendix."""

    task: Task = part(flat=True, default=Task())
    sgd: SGD = part(flat=True, default=SGD(100, 128, 0.1, ((0.0, 1.0), (0.75, 0.1), (0.9, 0.01))))
    out: Path | None = setting(
        None, "run folder; default: a folder in the cache, named after the settings", optional(path)
    )
    log_every: int = setting(50, "steps between two lines of metrics.jsonl", number(1, whole=True))
    save_every: int = setting(
        0, "steps between two saves of last.pt within an epoch; 0: save only after each epoch", number(0, whole=True)
    )

    def __post_init__(self) -> None:
        check(self)
