"""A stage's folder: made once, whole or not at all."""

import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

RECORD = "stage.json"


def sums(folder: Path) -> dict[str, str]:
    """The sha256 of each file of a folder but its record, by name."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != RECORD)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _record(folder: Path) -> dict | None:
    """What stage.json says, where the folder's files are what they were when it was written."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return record if record["files"] == sums(folder) else None
    except (OSError, ValueError, KeyError):
        return None


def _changes(old: dict, new: dict) -> str:
    """The inputs that differ: numbers with both values, sums of files by name alone."""
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    short = {n for n in changed if len(str(old.get(n))) < 40 and len(str(new.get(n))) < 40}
    return ", ".join(f"{n} was {old.get(n)}, is {new.get(n)}" if n in short else f"another {n}" for n in changed)


def stage(folder: Path, inputs: dict, make: Callable[[Path], dict]) -> dict:
    """The record of a folder: from the run that made it out of these inputs, or made now.

    `make(part)` fills an empty folder and gives its figures; the folder gets its name when all is written.  The record
    (inputs, figures, seconds, sha256 of each file) is stage.json in it.  Prints why a stage is skipped or made again.
    """
    inputs = json.loads(json.dumps(inputs))  # as it will be read back
    record = _record(folder)
    if record and record["inputs"] == inputs:
        print(f"{folder.name}: {folder} is there, whole and from the same inputs; skipped", flush=True)
        return record
    why = _changes(record["inputs"], inputs) if record else "a file is missing or changed"
    print(f"{folder.name}: makes {folder}{f', again ({why})' if folder.exists() else ''}", flush=True)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    part.mkdir(parents=True)
    started = time.monotonic()
    try:
        figures = make(part)
    except BaseException:
        shutil.rmtree(part)
        raise
    seconds = round(time.monotonic() - started, 1)
    record = {"inputs": inputs, "figures": figures, "seconds": seconds, "files": sums(part)}
    (part / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for path in part.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if folder.exists():  # nothing is deleted
        free = next(n for n in itertools.count(1) if not folder.with_name(f"{folder.name}.{n}").exists())
        print(f"  the old one is now {folder.rename(folder.with_name(f'{folder.name}.{free}'))}")
    part.rename(folder)
    print(f"  {folder.name}: done in {seconds:.0f} s", flush=True)
    return record
