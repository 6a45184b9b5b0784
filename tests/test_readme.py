"""The README's generated parts: as the code has them now.

``python tests/test_readme.py`` writes them anew.
"""

import ast
import inspect
import re
import textwrap
from pathlib import Path

import pytest

from dualtrain.algorithms.events import Event
from dualtrain.recipe.load import load_recipe
from dualtrain.recipe.reference import markdown_reference

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
OTHERS = {
    "recipes": "shipped recipes: quickstart, paper/, ablations/, imported/; sweeps: replication/",
    "ds_configs": "DeepSpeed JSON: the ZeRO stages, with and without offload",
    "tests": "mirrors the packages; real DeepSpeed, shards and processes; benchmarks/",
}


def first_sentence(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    first = docstring.split("\n\n")[0].replace("\n", " ").replace("``", "")
    return re.split(r"(?<=[^.])\.(?:\s|$)", first)[0]


def tree() -> str:
    lines = []
    for package in ("dualtrain", "data_tools"):
        lines.append(f"{package}/")
        files = sorted((ROOT / package).rglob("*.py"), key=lambda f: (f.parent, f.name))
        folder = ROOT / package
        for file in files:
            if file.parent != folder:
                folder = file.parent
                about = first_sentence(folder / "__init__.py")
                lines.append(f"  {folder.relative_to(ROOT / package)}/".ljust(22) + about)
            if file.name in ("__init__.py", "__main__.py"):
                continue
            indent = "  " * len(file.relative_to(ROOT).parts[:-1])
            lines.append(f"{indent}{file.name} ".ljust(22) + first_sentence(file))
    lines += [f"{name}/".ljust(22) + about for name, about in OTHERS.items()]
    return "\n".join(lines)


def event_map() -> str:
    loop = (inspect.getdoc(Event) or "").partition("::\n")[2]
    return textwrap.dedent(loop.partition("\n\n``state.step``")[0]).strip()


GENERATED = {
    "events": lambda: f"```text\n{event_map()}\n```",
    "tree": lambda: f"```text\n{tree()}\n```",
    "reference": lambda: markdown_reference().strip(),
}


def block(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- generated: {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)


@pytest.mark.parametrize("name", GENERATED)
def test_generated_part_is_up_to_date(name):
    found = block(name).search(README.read_text())
    assert found, f"no block {name}"
    expected = f"{found[1]}{GENERATED[name]()}{found[2]}"
    assert found[0] == expected, "run python tests/test_readme.py"


def test_recipes_named_in_the_readme_exist():
    command = r"dualtrain run (?:--dry-run )?(?!runs/)([a-z0-9][a-z0-9/.-]*)"
    named = set(re.findall(command, README.read_text()))
    assert len(named) >= 3
    for name in named:
        load_recipe(name)


def test_ci_runs_the_readmes_test_command():
    commands = re.findall(r"```bash\n(.*?)\n```", README.read_text(), re.DOTALL)
    assert any(command in (ROOT / ".ci" / "run").read_text() for command in commands)


def test_example_algorithm_of_the_readme_works():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    code = next(block for block in blocks if "class Scale(Algorithm)" in block)
    names: dict[str, type] = {}
    exec(code, names)
    algorithm = names["Scale"](factor=0.5)
    assert not algorithm.match(Event.FIT_START, None)


if __name__ == "__main__":
    text = README.read_text()
    for part, generate in GENERATED.items():
        content = generate()
        text = block(part).sub(lambda found, c=content: f"{found[1]}{c}{found[2]}", text)
    README.write_text(text)
