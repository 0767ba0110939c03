"""python -m fastafd.pretrain: train a natural classifier by the appendix's recipe, once for each configuration.

The weights are kept in the cache under a key of everything that shapes them, so that `fastafd.train` finds them.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from fastafd import cli
from fastafd.config import PretrainConfig
from fastafd.console import Console
from fastafd.data import load_dataset
from fastafd.device import resolve_device
from fastafd.models.cost import multiplications
from fastafd.training.natural import folder_of, fresh_model, pretrain, set_threads


def main(argv: list[str]) -> None:
    config = cli.parse(PretrainConfig(), argv, prog="fastafd.pretrain", about=__doc__)
    console = Console()
    dataset = load_dataset(config.task.dataset, config.task.data_dir, config.task.image_size)
    net = fresh_model(config.task, dataset)
    work = multiplications(net, dataset.image_size) * config.sgd.batch_size
    config = replace(config, task=set_threads(config.task, work, resolve_device(config.task.device)))
    pretrain(config, dataset, console)
    console.line("evaluate it: python -m fastafd.evaluate " + str(folder_of(config, dataset)))


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
