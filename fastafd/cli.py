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
from fastafd.settings import RunError, Stopped, UsageError, fraction, in_255ths, pixels, switch, user_path

LAUNCHERS = {  # the variable in which each counts its processes
    "WORLD_SIZE": "torchrun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
    "SLURM_STEP_NUM_TASKS": "srun",
}
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
    files, words = take(argv, {"--config": "a YAML file of settings"})
    parser.add_argument("--config", help="YAML file of settings, such as a run folder's config.yaml")
    listed = list(entries(defaults))
    written_in_files = [settings_of(user_path(file, "config"), defaults) for file in files["--config"]]
    from_files = {name: value for settings in written_in_files for name, value in settings.items()}
    for name, default, field in listed:
        value = from_files.get(name, default)
        shown = field.metadata["help"] + ("" if value is None else f" [{_plain(value)}]")
        convert = _converter(field, name)
        form: dict[str, Any] = {"default": value, "help": shown.replace("%", "%%"), "type": convert}
        if field.metadata["parse"] is switch:  # --json alone means --json true
            form |= {"nargs": "?", "const": True}
        parser.add_argument("--" + name.replace("_", "-"), metavar="VALUE", **form)
    known = {flag for action in parser._actions for flag in action.option_strings}
    for word in words:
        if word.startswith("--") and word.partition("=")[0] not in known:
            parser.error(f"unrecognized arguments: {word}")
    args = parser.parse_args(words)
    return build(defaults, {name: args[name] for name, _, _ in listed})


def settings_of(file: Path, defaults: Any) -> dict[str, Any]:
    """The settings in a YAML file, parsed, by dotted name. UsageError for a name or a value that is none of them."""
    fields = {name: field for name, _, field in entries(defaults)}
    sections = {name.partition(".")[0] for name in fields if "." in name}
    values: dict[str, Any] = {}
    for key, value in read_yaml(file).items():
        if key not in sections:
            values[key] = value
        elif isinstance(value, dict):
            values |= {f"{key}.{inner}": inner_value for inner, inner_value in value.items()}
        else:
            some = next(name for name in fields if name.startswith(f"{key}."))
            raise UsageError(f"{key}: got {value!r}, takes settings of its own, such as {some.partition('.')[2]}")
    for name in values:
        if name not in fields:
            near = _nearest(str(name), [*fields, *sections])
            raise UsageError(f"{name}: no such setting{f' (did you mean {near}?)' if near else ''}")
    return {name: fields[name].metadata["parse"](value, name) for name, value in values.items()}


def words_apart(argv: list[str], defaults: Any) -> tuple[list[str], list[str]]:
    """The words of `argv` that belong to no flag, and the flags with their values, each in order."""
    switches = {
        f"--{name.replace('_', '-')}" for name, _, field in entries(defaults) if field.metadata["parse"] is switch
    }
    words: list[str] = []
    flags: list[str] = []
    left = list(argv)
    while left:
        word = left.pop(0)
        if not word.startswith("-"):
            words.append(word)
            continue
        flags.append(word)
        alone = "=" in word or word in ("-h", "--help")
        if left and not alone and (word not in switches or left[0].lower() in ("true", "false")):
            flags.append(left.pop(0))
    return words, flags


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
        name: _as_written(value, field)
        for name, value, field in entries(config)
        if name not in NOT_LISTED and value != defaults[name]
    }


def written(config: Any) -> dict[str, Any]:
    """All settings of `config` by dotted name, in the form that a user writes: 8/255 for a length in pixels."""
    return {name: _as_written(value, field) for name, value, field in entries(config)}


def _as_written(value: Any, field: dataclasses.Field[Any]) -> Any:
    """The shorter of 8/255 and 0.0313… for a length in pixels, if both are the same length."""
    if field.metadata["parse"] is pixels:
        text = in_255ths(value)
        if math.isclose(fraction(text), value, rel_tol=1e-9) and len(text) <= len(str(value)):
            return text
    return _plain(value)


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
        settings = yaml.load(path.read_text(), _Loader)
    except RecursionError:
        raise UsageError(f"config: {path} cannot be read: it is nested too deeply") from None
    except (OSError, ValueError, LookupError, AttributeError, TypeError, yaml.YAMLError) as error:
        raise UsageError(
            f"config: {path} cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from None
    if not isinstance(settings, dict):
        raise UsageError(f"config: {path} holds no settings, takes lines such as 'lr: 0.01'")
    return settings


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but a key that is there twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in keys:
                    raise yaml.YAMLError(f"{key.value} is there twice, again in line {key.start_mark.line + 1}")
                keys.add(key.value)
        return super().construct_mapping(node, deep)


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
    """Raise UsageError under a launcher of several processes: each would do the same job in the same folder."""
    for variable, launcher in LAUNCHERS.items():
        processes = os.environ.get(variable, "1").strip() or "1"
        if processes != "1":
            raise UsageError(
                f"{launcher} has started {processes} processes ({variable}), and a verb runs in one; start it with"
                f" python -m, or without {variable} if no launcher set it"
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
        without_value = re.search(r"argument (\S+): expected one argument", message)
        if unrecognised and not unrecognised[1].startswith("-"):
            raise UsageError(f"{unrecognised[1]}: takes flags alone, and no flag before this word takes it")
        if unrecognised:
            got = unrecognised[1].split("=")[0]
            near = _nearest(got.removeprefix("--").replace("-", "_"), names)
            hint = f" (did you mean --{near.replace('_', '-')}?)" if near else "; --help lists them"
            raise UsageError(f"{got}: no such flag{hint}")
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
