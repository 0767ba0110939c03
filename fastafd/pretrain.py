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
from fastafd.models.cost import set_threads
from fastafd.training.natural import folder_of, fresh_model, pretrain


def main(argv: list[str]) -> None:
    config = cli.parse(PretrainConfig(), argv, prog="fastafd.pretrain", about=__doc__)
    console = Console()
    dataset = load_dataset(
        config.task.dataset,
        config.task.data_dir,
        config.task.image_size,
        skip_bad_images=config.task.skip_bad_images,
    )
    net = fresh_model(config.task, dataset).to(resolve_device(config.task.device))
    threads = set_threads(net, dataset.image_size, config.sgd.batch_size, config.task.threads)
    config = replace(config, task=replace(config.task, threads=threads))
    pretrain(config, dataset, console)
    console.line("evaluate it: python -m fastafd.evaluate " + str(folder_of(config, dataset)))


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
