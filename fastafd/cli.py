"""A command line made from a dataclass of settings: one flag a field, a YAML file, and one line for every mistake.

jsonargparse reads the flags and the file. The parser of each field checks its value and words the error message.
The order of precedence, later ones winning: the defaults (those of the recipe), `--config FILE`, then flags.
`run` ends a verb, and `run_script` a script of `benchmarks/`, with the same exit codes and lines.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import yaml

from fastafd.console import end
from fastafd.device import enough_memory
from fastafd.files import save_text
from fastafd.settings import RunError, Stopped, UsageError, pixels, switch

BUG = "error: this is a bug in fastafd, not a mistake of yours; please report it with the lines above"


def parse(defaults: Any, argv: list[str], prog: str, about: str | None) -> Any:
    """A copy of the dataclass instance `defaults` with the settings in `argv`. UsageError for anything it does not
    take.

    about: the verb's docstring, which --help shows above the flags.
    """
    parser = _Parser(
        prog=f"python -m {prog}",
        usage="%(prog)s [--FLAG VALUE …]",
        description=about,
        allow_abbrev=False,
        print_config=None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", action="config", help="YAML file of settings, such as a run folder's config.yaml")
    listed = list(entries(defaults))
    for name, value, field in listed:
        shown = field.metadata["help"] + ("" if value is None else f" [{_plain(value)}]")
        convert = _converter(field, name)
        form: dict[str, Any] = {"default": value, "help": shown.replace("%", "%%"), "type": convert}
        if field.metadata["parse"] is switch:  # --json alone means --json true
            form |= {"nargs": "?", "const": True}
        parser.add_argument("--" + name.replace("_", "-"), metavar="VALUE", **form)
    args = parser.parse_args(argv)
    return build(defaults, {name: args[name] for name, _, _ in listed})


def take(argv: list[str], flags: dict[str, str]) -> tuple[dict[str, list[str]], list[str]]:
    """The values of each of the flags in `argv`, in order, and the remaining words.

    flags: what each flag takes, such as {"--recipe": "a recipe"}. Raises UsageError for a flag without a value.
    """
    parser = _FirstParser(add_help=False, allow_abbrev=False)
    for flag, takes in flags.items():
        parser.add_argument(flag, dest=flag, metavar=takes, action="append", default=[])
    values, rest = parser.parse_known_args(argv)
    return vars(values), rest


def build(defaults: Any, values: dict[str, Any], prefix: str = "") -> Any:
    """A copy of `defaults` with the settings in `values`, by dotted name; the others stay."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(defaults):
        value = getattr(defaults, field.name)
        if dataclasses.is_dataclass(value):
            inner = prefix if field.metadata.get("flat") else f"{prefix}{field.name}."
            changes[field.name] = build(value, values, inner)
        elif prefix + field.name in values:
            changes[field.name] = values[prefix + field.name]
    return dataclasses.replace(defaults, **changes)


# Settings that a report names elsewhere (network, data, seed) or leaves out (where and how a run was done).
NOT_LISTED = (
    "arch",
    "dataset",
    "data_dir",
    "loader",
    "device",
    "amp",
    "engine",
    "threads",
    "seed",
    "out",
    "log_every",
    "save_every",
    "pretrained",
)


def changes(recipe: Any, config: Any) -> dict[str, Any]:
    """The settings of `config`, by dotted name, that differ from the recipe's, without those of `NOT_LISTED`."""
    defaults = {name: value for name, value, _ in entries(recipe)}
    return {
        name: _plain(value) for name, value, _ in entries(config) if name not in NOT_LISTED and value != defaults[name]
    }


def written(config: Any) -> dict[str, Any]:
    """All settings of `config` by dotted name, in the form that a user writes: 8/255 for a length in pixels."""

    def form(value: Any, parse: Any) -> Any:
        if parse is pixels and math.isclose(round(255 * value), 255 * value):
            return f"{round(255 * value)}/255"
        return _plain(value)

    return {name: form(value, field.metadata["parse"]) for name, value, field in entries(config)}


def to_yaml(config: Any) -> str:
    """All settings except the run folder, in the form that `--config` reads."""
    tree: dict[str, Any] = {}
    for name, value, _ in entries(config):
        if name == "out":
            continue
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = _plain(value)
    return yaml.safe_dump(tree, sort_keys=False)


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file. UsageError for a file that cannot be read or holds none."""
    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"config: {path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(settings, dict):
        raise UsageError(f"config: {path} holds no settings, takes lines such as 'lr: 0.01'")
    return settings


def run(main: Callable[[list[str]], None], argv: list[str]) -> NoReturn:
    """Run a verb and end the process: `run_script`'s exit codes, 0 done and 75 stopped by a signal after saving."""

    def verb() -> int:
        _stop_on_signals()
        _refuse_several_processes()
        main(argv)
        return 0

    run_script(verb, batch="--batch-size")


def run_script(main: Callable[[], int], batch: str = "batch") -> NoReturn:
    """Run a command and end the process with its exit code, or with 1 failed, 2 wrong usage.

    Every exception comes with one line on stderr; a bug also with its traceback. batch: what the user is told to take
    smaller where memory is full.
    """
    try:
        with enough_memory(lambda: f"Take a smaller {batch}, or end what else uses it"):
            code = main()
        sys.stdout.flush()  # inside this try, so that a closed pipe causes no traceback
        line = ""
    except UsageError as error:
        code, line = 2, f"error: {error}"
    except RunError as error:
        code, line = 1, f"error: {error}"
    except Stopped as stop:
        code, line = 75, str(stop)
    except BrokenPipeError:  # as with `| head`
        code, line = 1, ""
    except OSError as error:  # a folder without write permission, a full disk
        code, line = 1, f"error: {error.filename or 'writing'}: {error.strerror or error}"
    except Exception:
        traceback.print_exc()
        code, line = 1, BUG
    if line:
        with suppress(BrokenPipeError):
            print(re.sub(r"\s+", " ", line), file=sys.stderr)
    end(code)


def _refuse_several_processes() -> None:
    """Raise UsageError under torchrun: each of its processes would do the same job in the same folder."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise UsageError(
            f"torchrun has started {processes} processes (WORLD_SIZE), and a verb runs in one; start it with python -m"
        )


def _stop_on_signals() -> None:
    """Outside the training loop, which saves first, a signal ends the verb with 75, a second SIGINT with 130."""
    asked: list[int] = []

    def stop(number: int, _: object) -> None:
        if asked and number == signal.SIGINT:
            os._exit(130)
        asked.append(number)
        raise Stopped(f"stopped by {signal.Signals(number).name}; finished work is saved")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


class _FirstParser(argparse.ArgumentParser):
    """argparse's parser with an error message of this project, for the flags that `take` takes."""

    def error(self, message: str) -> NoReturn:
        flag = re.search(r"argument (\S+):", message)
        takes = {action.dest: action.metavar for action in self._actions}
        raise UsageError(f"{flag[1]}: takes {takes[flag[1]]}" if flag else message)


class _Parser(jsonargparse.ArgumentParser):
    """jsonargparse's parser with error messages of this project."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        flags = [flag for action in self._actions for flag in action.option_strings]
        names = [flag.removeprefix("--").replace("-", "_") for flag in flags]
        unrecognised = re.search(r"unrecognized arguments: (\S+)", message)
        unknown_key = re.search(r"[Oo]ption '([^']+)' is not accepted", message)
        without_value = re.search(r"argument (\S+): expected one argument", message)
        if unrecognised and not unrecognised[1].startswith("-"):
            raise UsageError(f"{unrecognised[1]}: no flag stands before it")
        if unrecognised:
            got = unrecognised[1].split("=")[0]
            near = _nearest(got.removeprefix("--").replace("-", "_"), names)
            hint = f" (did you mean --{near.replace('_', '-')}?)" if near else "; --help lists them"
            raise UsageError(f"{got}: no such flag{hint}")
        if unknown_key:
            near = _nearest(unknown_key[1], names)
            raise UsageError(f"{unknown_key[1]}: no such setting{f' (did you mean {near}?)' if near else ''}")
        if without_value:
            raise UsageError(f"{without_value[1]}: takes a value")
        raise UsageError(re.sub(r'Parser key "([^"]+)":', r"\1:", message))


def _nearest(got: str, names: list[str]) -> str | None:
    """The setting that was probably meant.

    One whose last part is `got`, else one with a similar spelling, else None.
    """
    for name in names:
        if name.rpartition(".")[2] == got:
            return name
    return next(iter(difflib.get_close_matches(got, names, n=1, cutoff=0.6)), None)


def entries(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """(dotted name, value, field) of every setting; the name has no prefix for settings of flat parts."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from entries(value, prefix if field.metadata.get("flat") else f"{prefix}{field.name}.")
        elif "help" in field.metadata:
            yield prefix + field.name, value, field


def _converter(field: dataclasses.Field[Any], name: str) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        return field.metadata["parse"](value, name)

    return convert


def _plain(value: Any) -> Any:
    """The value in the form that YAML writes: lists instead of tuples, text instead of paths."""
    if isinstance(value, tuple):
        return [list(pair) for pair in value]
    return str(value) if isinstance(value, Path) else value


def write_config(folder: Path, config: Any) -> None:
    """Write the run folder's `config.yaml`."""
    save_text(folder / "config.yaml", to_yaml(config))
