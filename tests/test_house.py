"""The house: floors import only from below, one file knows deepspeed, shards/ loads no torch, the reading stays short."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("shards", "pretrain", "finetune")
PRODUCT = sorted(file for floor in FLOORS for file in (ROOT / floor).rglob("*.py"))
TOOLS = sorted((ROOT / "launch").glob("*.py"))  # what a person starts beside the floors


def imported(file: Path) -> set[str]:
    """Top-level names of every module that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("file", PRODUCT, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_floor_imports_only_from_below(file):
    floor = FLOORS.index(file.relative_to(ROOT).parts[0])
    assert not imported(file) & {*FLOORS[floor + 1:], "tests", "launch"}


def test_one_file_knows_deepspeed():
    assert [str(f.relative_to(ROOT)) for f in PRODUCT if "deepspeed" in imported(f)] == ["pretrain/engine.py"]


def loads(modules: str, looked_for: tuple[str, ...]) -> str:
    """Which of some packages a fresh process has loaded after importing modules."""
    code = f"import sys, {modules}; print([m for m in {looked_for} if m in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def test_shards_load_no_torch():
    files = ", ".join(f"shards.{file.stem}" for file in PRODUCT if file.parts[-2] == "shards" and file.stem != "__init__")
    assert loads(files, ("torch", "transformers", "webdataset")) == "[]"


def test_reading_the_options_loads_nothing_heavy():
    assert loads("pretrain.general", ("torch", "transformers", "deepspeed", "webdataset", "numpy")) == "[]"


def test_the_qnli_stage_loads_no_drawing_before_its_report():
    assert loads("finetune.stages", ("matplotlib", "markdown")) == "[]"


def test_the_reading_stays_short():
    lines = {file: len(file.read_text().splitlines()) for file in PRODUCT}
    assert sum(lines.values()) <= 4_000, f"{sum(lines.values())} lines of product: delete some before adding more"
    assert {str(file): n for file in PRODUCT + TOOLS if (n := len(file.read_text().splitlines())) > 300} == {}


def test_functions_stay_short():
    long = {}
    for file in PRODUCT + TOOLS:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno >= 60:
                long[f"{file.name}:{node.name}"] = node.end_lineno - node.lineno + 1
    assert long == {}


def test_the_top_level_is_the_agreed_one():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    allowed = {"shards", "pretrain", "finetune", "ds_configs", "launch", "tests", "setup.cfg", "README.md", "pyproject.toml",
               "constraints.txt", "LICENSE", ".ci", ".gitignore", "CONTRIBUTING.md", ".pre-commit-config.yaml"}
    assert {name.split("/")[0] for name in tracked} <= allowed
