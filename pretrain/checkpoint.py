"""Checkpoints that are whole or absent, a folder (tag) for all students: DeepSpeed itself neither syncs, renames nor checks."""

import hashlib
import json
import os
import shutil
from functools import partial
from pathlib import Path

from pretrain.engine import Engine
from pretrain.ranks import Ranks
from pretrain.recipe import NOT_LEARNED, Recipe
from shards.block import write, write_json

KEEP = 3  # newest good checkpoints that stay


def save(folder: Path, engines: list[Engine], ranks: Ranks, step: int, about: dict, last: Path | None) -> Path:
    """Write `step-N` whole, on all ranks.  ValueError names the `last` good one where that fails; nothing of it stays then."""
    tag, part = folder / f"step-{step}", folder / f"step-{step}.part"
    try:
        ranks.first(partial(_prepare, part, [engine.name for engine in engines]))
        for engine in engines:
            ranks.agree(engine.save(part))
        ranks.first(partial(_publish, part, tag, ranks.world * len(engines), {"step": step, **about}))
    except ValueError as error:
        if ranks.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise ValueError(f"step {step}: {error}. The last good checkpoint is {last}; the same command goes on") from error
    return tag


def _prepare(part: Path, students: list[str]) -> None:
    """Empty folders for the students; what a killed run left half-made goes."""
    for left in part.parent.glob("*.part"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()  # a file is one of `latest`
    for name in students:
        (part / name).mkdir(parents=True)


def _publish(part: Path, tag: Path, optimizers: int, facts: dict) -> None:
    """Let a complete `part` appear as `tag`, and old tags go."""
    if len(list(part.rglob("*optim_states.pt"))) != optimizers:
        raise ValueError(f"{part}: not every rank's file is there; --out must be a folder that every node sees")
    files = {str(path.relative_to(part)): {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
             for path in sorted(part.rglob("*")) if path.is_file()}
    write_json(part / "manifest.json", {**facts, "files": files})
    sync(part, *part.rglob("*"))
    shutil.rmtree(tag, ignore_errors=True)  # a damaged one of the same step
    part.rename(tag)
    sync(tag.parent)
    verified(tag)
    write(tag.parent / "latest", tag.name.encode())  # for people: a run takes the newest tag whose sums are right
    older, keep_every = [step for step in _tags(tag.parent) if step <= facts["step"]], facts["settings"]["keep_every"]
    for step in older[KEEP:]:  # newer ones are damaged
        if not keep_every or step % keep_every:
            shutil.rmtree(tag.with_name(f"step-{step}"))


def sync(*paths: Path) -> None:
    """Files and folders onto the disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _tags(folder: Path) -> dict[int, Path]:
    """Complete tags by step, newest first."""
    tags = {int(tag.name[5:]): tag for tag in folder.glob("step-*") if tag.name[5:].isdigit()}
    return dict(sorted(tags.items(), reverse=True))


def verified(tag: Path) -> dict:
    """A tag's manifest, every file's size and sum checked.  ValueError names the file and what is wrong with it."""
    try:
        facts = json.loads((tag / "manifest.json").read_text())
        files = facts["files"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"checkpoint {tag}: its manifest.json is missing or damaged ({error})") from None
    for name, expected in files.items():
        size = (tag / name).stat().st_size if (tag / name).is_file() else "no"
        if size != expected["bytes"]:
            raise ValueError(f"checkpoint {tag}: {name} has {size} bytes, not {expected['bytes']}; it is cut or missing")
        if hashlib.sha256((tag / name).read_bytes()).hexdigest() != expected["sha256"]:
            raise ValueError(f"checkpoint {tag}: {name} is damaged (its sha256 is another)")
    return facts


def newest_good(folder: Path, about: dict) -> tuple[Path, int, list[str], bool] | None:
    """The newest whose sums are right: (tag, step, notes for a person, must it be converted); ValueError where none is usable."""
    notes = []
    for tag in _tags(folder).values():
        try:
            facts = verified(tag)
            break
        except ValueError as error:
            notes.append(f"passed over: {error}")
    else:
        if notes:
            raise ValueError(f"no good checkpoint in {folder}: {'; '.join(notes)}. Start over with --fresh")
        return None
    if apart := differences(*(vars(Recipe()) | its["settings"] for its in (facts, about))):  # a newer setting had its default
        raise ValueError(f"checkpoint {tag} belongs to a run with other settings: {apart}. Give the same settings, another "
                         "--out, or --fresh to begin anew (the old run is kept, renamed)")
    was, now = facts["settings"]["steps"], about["settings"]["steps"]
    if facts["step"] > now:
        raise ValueError(f"{tag} is {facts['step']} steps old already; write steps={facts['step']} or more, or --fresh")
    notes.append(f"goes on from {tag} (row {facts['step'] * about['settings']['batch']:,})")
    if was != now:
        notes.append(f"steps was {was:,}, is {now:,}: the rate of every later step follows from its number and the new length")
    if machine := differences(facts["machine"], about["machine"]):
        notes.append(f"{machine}: through DeepSpeed's universal checkpoint, and dropout is drawn anew")
    return tag, facts["step"], notes, bool(machine)


def differences(was: dict, now: dict) -> str:
    """What was and is, of each value that is another one now; nothing of what teaches nothing."""
    return "; ".join(f"{key} was {was.get(key)}, is {now.get(key)}" for key in sorted(was.keys() | now.keys())
                     if key not in (*NOT_LEARNED, "steps") and was.get(key) != now.get(key))
