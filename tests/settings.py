"""The README's reference of settings, made from the code:   python tests/settings.py   writes it anew."""

import ast
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHERE = {"pretrain": ("pretrain/recipe.py", "Recipe"), "finetune": ("finetune/qnli.py", "Settings")}


def described(file: str, name: str) -> list[str]:
    """`key=default` with the comment of its line, for each field of a dataclass."""
    text = (ROOT / file).read_text()
    fields = next(node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == name).body
    found = []
    for field in fields:
        if isinstance(field, ast.AnnAssign):
            line = text.splitlines()[field.end_lineno - 1]
            comment = line[field.end_col_offset:].strip().removeprefix("#").strip()
            found.append(f"`{field.target.id}={ast.literal_eval(field.value)}`" + (f" {comment}" if comment else ""))
    return found


def reference(floor: str) -> str:
    return textwrap.fill(" · ".join(described(*WHERE[floor])), 600, break_long_words=False, break_on_hyphens=False)


def written(readme: str) -> str:
    """A README with the references between their markers."""
    for floor in WHERE:
        begin, end = f"<!-- settings of {floor} -->\n", "<!-- end -->\n"
        before, _, rest = readme.partition(begin)
        _, _, after = rest.partition(end)
        readme = before + begin + reference(floor) + "\n" + end + after
    return readme


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(written(readme.read_text()))
