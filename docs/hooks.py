"""What mkdocs adds to the pages while it builds them: generated tables, and the result files that pages link to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from fastafd import cli
from fastafd.config import TrainConfig
from fastafd.recipes import RECIPES, released
from fastafd.reporting.markdown import markdown_table

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Any, config: Any) -> Any:
    """Add every result file, so that the numbers of a page are one click away."""
    for path in sorted((ROOT / "benchmarks" / "results").rglob("*.json")):
        files.append(File.generated(config, str(path.relative_to(ROOT / "benchmarks")), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill the markers of recipes.md, and let links to results lead to the files of the site."""
    markdown = markdown.replace("<!-- recipes -->", recipes_table()).replace("<!-- settings -->", settings_table())
    # In the repository a page links to ../benchmarks/results/; a link to a folder has no page on the site.
    markdown = re.sub(r"\[([^\]]*)\]\(\.\./benchmarks/(results/[^)]*\.json)\)", r"[\1](\2)", markdown)
    return re.sub(r"\[([^\]]*)\]\(\.\./benchmarks/(results/[^)]*)\)", r"\1 (`benchmarks/\2`)", markdown)


def settings_of(config: TrainConfig) -> dict[str, str]:
    """Every setting by dotted name, as a user writes it."""
    return {name: "none" if value is None else str(value) for name, value in cli.written(config).items()}


def recipes_table() -> str:
    """A row for each recipe: its method, and the settings that differ from `released`."""
    base = settings_of(released())
    rows = []
    for name, recipe in RECIPES.items():
        config = recipe()
        changed = {
            key: value for key, value in settings_of(config).items() if base.get(key) != value and key != "recipe"
        }
        rows.append([f"`{name}`", config.method.label, ", ".join(f"`{key}` {value}" for key, value in changed.items())])
    return markdown_table(["recipe", "method", "settings that differ from `released`"], rows)


def settings_table() -> str:
    """A row for each flag of `fastafd.train`."""
    config = released()
    values = settings_of(config) | {"data_dir": "data"}  # a path is made absolute
    rows = [
        [f"`--{name.replace('_', '-')}`", values[name], field.metadata["help"]]
        for name, _, field in cli.entries(config)
    ]
    return markdown_table(["flag", "`released`", "meaning"], rows)
