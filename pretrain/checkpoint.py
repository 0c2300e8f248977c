"""Checkpoints that are whole or absent: a tag is one folder for all students, checked by sums before it is read.

DeepSpeed neither syncs nor renames, writes `latest` before the other ranks are done, and loads a file with a
flipped byte without complaint.  So every rank writes into `step-N.part`; then rank 0 syncs the files, writes
`manifest.json` with their sizes and sha256, renames the folder, and renames a new `latest` into place.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.engine import Engine, Ranks
from pretrain.recipe import NOT_LEARNED
from shards.block import written_whole

KEEP = 3  # newest good checkpoints that stay


def save(folder: Path, engines: list[Engine], ranks: Ranks, *, step: int, rows: int, about: dict) -> Path:
    """Write `step-N` whole; every rank calls it.  `about` (recipe, machine, students) goes into its manifest."""
    tag = folder / f"step-{step}"
    part = folder / f"step-{step}.part"
    if ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
    states = [None] * ranks.world
    dist.all_gather_object(states, _random_state(ranks))  # a barrier too: the folder is there
    for engine in engines:
        engine.save(part, {"random": states})
    dist.barrier()
    error = None
    try:
        if ranks.rank == 0:
            _publish(part, tag, ranks.world * len(engines), {"step": step, "rows": rows, **about})
    except (OSError, ValueError) as caught:
        error = caught
    ranks.agree(error)
    return tag


def _publish(part: Path, tag: Path, optimizers: int, facts: dict) -> None:
    """Let a complete `part` appear as `tag`, and old tags go."""
    if len(list(part.rglob("*optim_states.pt"))) != optimizers:
        raise ValueError(f"{part}: not every rank's file is there; --out must be a folder that every node sees")
    _seal(part, facts)
    shutil.rmtree(tag, ignore_errors=True)  # a damaged one of the same step
    part.rename(tag)
    with written_whole(tag.parent / "latest") as file:
        file.write(tag.name.encode())
    _sync(tag.parent)
    older = [t for t in _tags(tag.parent) if int(t.name[5:]) <= facts["step"]]  # damaged newer ones do not count
    for old in older[KEEP:]:
        shutil.rmtree(old)


def _random_state(ranks: Ranks) -> dict:
    state = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(ranks.device)
    return state


def _seal(part: Path, facts: dict) -> None:
    files = {}
    for path in sorted(p for p in part.rglob("*") if p.is_file()):
        _sync(path)
        files[str(path.relative_to(part))] = {"bytes": path.stat().st_size, "sha256": _sum(path)}
    with written_whole(part / "manifest.json") as file:
        file.write(json.dumps({**facts, "files": files}, indent=1).encode())
    for path in [part, *(p for p in part.rglob("*") if p.is_dir())]:
        _sync(path)


def _sum(path: Path) -> str:
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            sha256.update(piece)
    return sha256.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _tags(folder: Path) -> list[Path]:
    """Complete tags, newest first."""
    tags = [p for p in folder.glob("step-*") if p.name[5:].isdigit()]
    return sorted(tags, key=lambda p: int(p.name[5:]), reverse=True)


def verified(tag: Path) -> dict:
    """A tag's manifest, every file's size and sum checked.  ValueError names the file and what is wrong with it."""
    try:
        facts = json.loads((tag / "manifest.json").read_text())
        files = facts["files"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"checkpoint {tag}: its manifest.json is missing or damaged ({error})") from None
    for name, expected in files.items():
        path = tag / name
        if not path.is_file():
            raise ValueError(f"checkpoint {tag}: {name} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise ValueError(f"checkpoint {tag}: {name} has {path.stat().st_size:,} bytes, not {expected['bytes']:,}")
        if _sum(path) != expected["sha256"]:
            raise ValueError(f"checkpoint {tag}: {name} is damaged (its sha256 is another)")
    return facts


def newest_good(folder: Path, ranks: Ranks) -> tuple[Path, dict, list[str]] | None:
    """(tag, manifest, what is wrong with newer ones), chosen by rank 0 for all; None where there is none."""
    found = [None]
    if ranks.rank == 0:
        faults = []
        for tag in _tags(folder):
            try:
                found = [(tag, verified(tag), faults)]
                break
            except ValueError as error:
                faults.append(str(error))
        if faults and found == [None]:
            found = [ValueError(f"no good checkpoint in {folder}: {'; '.join(faults)}. Start over with --fresh")]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], ValueError):
        raise found[0]
    return found[0]


def check_same(facts: dict, about: dict, tag: Path) -> None:
    """Refuse to go on with other learning settings than the run had; logging, saving and `steps` may change."""
    differences = []
    for part in ("recipe", "students", "shards", "teacher", "machine"):
        was, now = facts.get(part), about[part]
        if not isinstance(was, dict):
            was, now = {part: was}, {part: now}
        for key in sorted(was.keys() | now.keys()):
            if key not in (*NOT_LEARNED, "steps") and was.get(key) != now.get(key):
                differences.append(f"{key} was {was.get(key)}, is {now.get(key)}")
    if differences:
        raise ValueError(f"checkpoint {tag} belongs to a run with other settings: {'; '.join(differences)}. Give the "
                         "same settings, another --out, or --fresh to begin anew (the old run is kept, renamed)")


def load(tag: Path, engines: list[Engine], ranks: Ranks) -> None:
    """Every student's weights, optimizer and this rank's random state."""
    for engine in engines:
        state = engine.load(tag)["random"][ranks.rank]
        torch.set_rng_state(state["cpu"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], ranks.device)
