"""A stage's folder: made once, whole or not at all."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

RECORD = "stage.json"


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _record(folder: Path) -> dict | None:
    """What stage.json says, if every file of the folder is what it was when it was written."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        whole = all(_sum(folder / name) == wanted for name, wanted in record["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return record if whole else None


def _aside(folder: Path) -> Path:
    """Rename a folder to the first free of FOLDER.1, FOLDER.2, ...: nothing is deleted."""
    number = next(n for n in range(1, 1_000_000) if not folder.with_name(f"{folder.name}.{n}").exists())
    return folder.rename(folder.with_name(f"{folder.name}.{number}"))


def _because(old: dict, new: dict) -> str:
    changed = [f"{name} was {old.get(name)!r}, is {new.get(name)!r}" if len(str(new.get(name))) < 40 else f"other {name}"
               for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return ", ".join(changed)


def stage(folder: Path, inputs: dict, make: Callable[[Path], dict]) -> dict:
    """What `make(part)` gave, from now or from the run that made `folder` out of the same inputs.

    `make` fills an empty folder beside it, which gets the name `folder` when all is written; stage.json in it holds
    the inputs, the figures, the seconds, and the sha256 of each file.  Prints why it is skipped or made again.
    """
    inputs = json.loads(json.dumps(inputs))  # as it will be read back
    record = _record(folder)
    if record and record["inputs"] == inputs:
        print(f"{folder.name}: {folder} is there, whole and from the same inputs; skipped", flush=True)
        return record
    why = ""
    if folder.exists():
        why = f", again ({_because(record['inputs'], inputs) if record else 'a file is missing or changed'})"
    print(f"{folder.name}: makes {folder}{why}", flush=True)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    part.mkdir(parents=True)
    started = time.monotonic()
    try:
        figures = make(part)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    files = sorted(path for path in part.iterdir() if path.is_file())
    record = {"inputs": inputs, "figures": figures, "seconds": round(time.monotonic() - started, 1),
              "files": {path.name: _sum(path) for path in files}}
    (part / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for path in [*files, part / RECORD]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if folder.exists():
        print(f"  the old one is now {_aside(folder)}")
    part.rename(folder)
    print(f"  {folder.name}: done in {record['seconds']:.0f} s", flush=True)
    return record
