"""Figures that papers report, to stand beside ours."""

from __future__ import annotations

# Table 5 of the AFD paper (Zhou et al., AAAI 2025): training time, ResNet-18 on CIFAR-10, one RTX 4090, of each method
# its epochs, seconds of one, and seconds in all. Those of Free-AT, FGSM-GA and ATAS it excerpts from Huang et al. 2023.
TABLE5: dict[str, tuple[int, float, float]] = {
    "Standard": (100, 6.0, 590.0),
    "PGD-AT": (120, 37.0, 4440.0),
    "TRADES": (120, 53.0, 6360.0),
    "Free-AT": (10, 119.0, 1188.0),
    "FGSM-GA": (30, 68.0, 2052.0),
    "ATAS": (30, 36.0, 1080.0),
    "vAFT": (20, 37.0, 1330.0),
    "RiFT": (10, 25.0, 4690.0),
    "AFKD": (20, 40.0, 1390.0),
    "ARREST": (20, 36.0, 1310.0),
    "AFD": (20, 46.0, 1510.0),
}

# Tables 1 and 2: per cent, clean, PGD-20 and AutoAttack, by architecture, data set and method. Those of Free-AT,
# FGSM-GA and ATAS are from Huang et al. 2023, who attacked by PGD-10.
ACCURACY: dict[str, dict[str, dict[str, tuple[float, float, float]]]] = {
    "resnet18": {
        "cifar10": {
            "PGD-AT": (84.43, 48.82, 43.68),
            "TRADES": (82.37, 53.27, 48.52),
            "Free-AT": (78.37, 40.9, 36.0),
            "FGSM-GA": (80.1, 49.14, 43.44),
            "ATAS": (81.22, 50.03, 45.38),
            "vAFT": (83.93, 51.4, 45.48),
            "RiFT": (84.49, 49.24, 43.66),
            "AFKD": (84.71, 51.32, 46.09),
            "ARREST": (85.71, 51.23, 46.23),
            "AFD": (84.88, 52.7, 47.4),
        },
        "cifar100": {
            "PGD-AT": (59.09, 24.05, 20.67),
            "TRADES": (55.47, 28.12, 23.49),
            "Free-AT": (50.56, 19.57, 15.09),
            "FGSM-GA": (50.61, 24.48, 19.42),
            "ATAS": (55.49, 27.68, 22.62),
            "vAFT": (60.83, 26.55, 21.96),
            "RiFT": (59.51, 24.01, 20.48),
            "AFKD": (65.54, 28.09, 22.92),
            "ARREST": (67.0, 26.89, 21.34),
            "AFD": (65.69, 28.56, 23.05),
        },
        "tiny-imagenet": {
            "PGD-AT": (52.12, 19.38, 16.79),
            "TRADES": (49.28, 22.59, 17.06),
            "vAFT": (52.75, 21.29, 16.76),
            "RiFT": (52.24, 20.89, 17.05),
            "AFKD": (57.17, 22.29, 16.68),
            "ARREST": (60.36, 19.28, 12.58),
            "AFD": (57.41, 23.63, 17.73),
        },
    },
    "wrn34_10": {
        "cifar10": {
            "PGD-AT": (86.35, 49.57, 45.81),
            "TRADES": (85.68, 52.53, 49.22),
            "vAFT": (87.42, 53.57, 48.49),
            "RiFT": (84.49, 49.24, 45.83),
            "AFKD": (88.54, 54.86, 49.57),
            "ARREST": (88.42, 54.16, 49.45),
            "AFD": (88.08, 56.12, 51.62),
        },
        "cifar100": {
            "PGD-AT": (60.3, 25.14, 22.65),
            "TRADES": (57.67, 28.26, 25.25),
            "vAFT": (64.92, 27.19, 23.59),
            "RiFT": (60.59, 25.57, 22.67),
            "AFKD": (68.5, 30.12, 25.28),
            "ARREST": (69.52, 29.47, 24.55),
            "AFD": (68.51, 32.63, 27.62),
        },
        "tiny-imagenet": {
            "PGD-AT": (54.24, 19.03, 16.51),
            "TRADES": (49.22, 23.33, 18.51),
            "vAFT": (57.17, 22.24, 18.02),
            "RiFT": (55.09, 19.51, 16.79),
            "AFKD": (60.92, 24.27, 19.01),
            "ARREST": (65.07, 22.73, 16.67),
            "AFD": (63.89, 25.73, 19.13),
        },
    },
}

# Table 3: per cent, ResNet-18 on CIFAR-10.
ABLATION: dict[str, tuple[float, float, float]] = {
    "vAFT": (83.93, 51.40, 45.48),
    "vAFT+D": (84.63, 52.68, 46.88),
    "vAFT+A": (84.61, 51.71, 46.81),
    "AFD": (84.88, 52.70, 47.40),
}

# Table 4: clean accuracy in per cent of the features f1 and f2, by architecture and data set.
FEATURES: dict[tuple[str, str], tuple[float, float]] = {
    ("resnet18", "cifar10"): (84.88, 39.05),
    ("resnet18", "cifar100"): (65.69, 58.17),
    ("resnet18", "tiny-imagenet"): (57.41, 48.78),
    ("resnet50", "cifar10"): (87.01, 35.97),
    ("resnet50", "cifar100"): (67.45, 56.17),
    ("wrn34_10", "cifar10"): (88.08, 46.89),
    ("wrn34_10", "cifar100"): (68.51, 62.84),
    ("wrn34_10", "tiny-imagenet"): (63.89, 55.15),
}

# Table 6: clean accuracy in per cent of the pre-trained models, by architecture and data set.
PRETRAINED: dict[tuple[str, str], float] = {
    ("resnet18", "cifar10"): 94.60,
    ("resnet18", "cifar100"): 76.55,
    ("resnet18", "tiny-imagenet"): 64.81,
    ("resnet50", "cifar10"): 94.30,
    ("resnet50", "cifar100"): 77.20,
    ("wrn34_10", "cifar10"): 95.53,
    ("wrn34_10", "cifar100"): 80.28,
    ("wrn34_10", "tiny-imagenet"): 67.86,
}

# Its section on training time: parameters in millions of a network, and of D1 and D2 together.
PARAMETERS: dict[str, tuple[float, float]] = {"resnet18": (11.2, 0.5), "wrn34_10": (46.2, 2.0)}
