"""Writing files completely or not at all."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fastafd.settings import RunError


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it. If that fails: RunError, and no file is left."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch and safetensors raise RuntimeErrors for a full disk
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise RunError(f"{path}: cannot be written: {reason}") from error
    finally:
        with suppress(OSError):  # the folder may not exist
            temporary.unlink(missing_ok=True)


def as_json(value: object) -> str:
    """Indented JSON in which a list of numbers is one line."""
    text = json.dumps(value, indent=1, default=str)
    return re.sub(r"\[[-+.eE\d,\s]+\]", lambda match: re.sub(r"\s+", " ", match[0]), text)


def save_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 with `write_atomic`. File names of another encoding keep their bytes."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="surrogateescape"))
