"""Configuration files of triggers, and `isthmus trigger` as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.paths import SHARED


def configuration_file(folder: Path, source: dict[str, Any], *results: dict[str, Any], **tables: Any) -> Path:
    """A file with these tables; SQLite's file of records is in the folder."""
    tables = {"records": {"url": f"sqlite:{folder / 'records.sqlite'}"}, **tables}
    single = {name: value for name, value in tables.items() if not isinstance(value, dict)}
    lines = [_line(name, value) for name, value in single.items()]
    for name, table in {"source": source, **tables}.items():
        if isinstance(table, dict):
            lines += [f"[{name}]", *(_line(key, value) for key, value in table.items())]
    for place in results:
        lines += ["[[results]]", *(_line(key, value) for key, value in place.items())]
    path = folder / "trigger.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def _line(key: str, value: Any) -> str:
    return f"{key} = {value if isinstance(value, int) else repr(value)}"


def trigger_process(configuration: Path, *options: str, **streams: Any) -> subprocess.Popen[str]:
    """`isthmus trigger` with the file, in its folder."""
    return subprocess.Popen(
        [sys.executable, "-c", "from isthmus_tools.cli import main; main()", "trigger", str(configuration), *options],
        cwd=configuration.parent,
        env={**os.environ, "PYTHONPATH": str(SHARED)},
        text=True,
        **streams,
    )
