"""Tests of: the READMEs: generated parts, commands, links.

``python tests/test_readme.py`` writes the generated parts anew.
"""

import ast
import inspect
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import typer

from data_tools.command import app as data_app
from dualtrain.algorithms.events import Event
from dualtrain.cli import app
from dualtrain.recipe.reference import markdown_reference
from dualtrain.recipe.shipped import find_recipe, shipped_recipes

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOORS = sorted(
    file
    for place in (".", "*", "dualtrain/*", "recipes/*", "tests/benchmarks")
    for file in ROOT.glob(f"{place}/*.md")
    if ".venv" not in file.parts
)
LONGEST_README = 250
OTHERS = {
    "data_tools": "corpora to datasets: readers, tokenizers, conversion, verification",
    "recipes": "shipped: quickstart, slowrun, paper, ablations, babylm, imported; replication",
    "ds_configs": "DeepSpeed JSON: the ZeRO stages, with and without offload",
    "tests": "mirror the rooms; helpers/, experiments/, benchmarks/",
}


def first_sentence(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    first = docstring.split("\n\n")[0].replace("\n", " ").replace("``", "")
    return re.split(r"(?<=[^.])\.(?:\s|$)", first)[0]


def rooms() -> str:
    folders = sorted(path.parent for path in (ROOT / "dualtrain").glob("*/__init__.py"))
    lines = ["dualtrain/", "  cli.py ".ljust(18) + first_sentence(ROOT / "dualtrain" / "cli.py")]
    for folder in folders:
        lines.append(f"  {folder.name}/ ".ljust(18) + first_sentence(folder / "__init__.py"))
    lines += [f"{name}/ ".ljust(18) + about for name, about in OTHERS.items()]
    return "\n".join(lines)


def event_map() -> str:
    loop = (inspect.getdoc(Event) or "").partition("::\n")[2]
    return textwrap.dedent(loop.partition("\n\n``state.step``")[0]).strip()


def shipped() -> str:
    rows = [f"| `{name}` | {about} |" for name, about in shipped_recipes()]
    return "\n".join(["| recipe | |", "|---|---|", *rows])


GENERATED = {
    "events": (README, lambda: f"```text\n{event_map()}\n```"),
    "rooms": (README, lambda: f"```text\n{rooms()}\n```"),
    "recipes": (ROOT / "recipes" / "README.md", shipped),
    "reference": (ROOT / "recipes" / "README.md", lambda: markdown_reference().strip()),
}


def block(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)", re.DOTALL)


def written_anew(name: str, text: str) -> str:
    content = GENERATED[name][1]()
    return block(name).sub(lambda found: f"{found[1]}{content}\n{found[2]}", text)


def blocks_of(file: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", file.read_text(), re.DOTALL)


@pytest.mark.parametrize("name", GENERATED)
def test_generated_part_is_up_to_date(name):
    text = GENERATED[name][0].read_text()
    assert block(name).search(text), f"no block {name}"
    assert written_anew(name, text) == text, "run python tests/test_readme.py"


def test_a_person_can_read_it():
    assert len(README.read_text().splitlines()) <= LONGEST_README


def dualtrain_commands() -> list[tuple[str, str]]:
    """Every command of dualtrain in a block of bash or in a line, with the file it stands in."""
    found = []
    for file in DOORS:
        lines = re.findall(r"`(dualtrain [^`…]+)`", file.read_text())
        for text in blocks_of(file, "bash"):
            lines += text.replace("\\\n", " ").splitlines()
        for line in lines:
            for part in re.split(r"&&|\|\||;|\|", line):
                words = shlex.split(part, comments=True)
                words = words[1:] if words[:1] in (["srun"], ["until"]) else words
                if words[:1] == ["dualtrain"]:
                    found.append((str(file.relative_to(ROOT)), " ".join(part.split())))
    return found


def test_commands_have_these_options():
    """As the command line itself has them; values are other tests' matter."""
    commands = dualtrain_commands()
    assert len(commands) > 30
    for file, command in commands:
        words = shlex.split(command, comments=True)
        words = words[words.index("dualtrain") + 1 :]
        found = typer.main.get_command(data_app if words[0] == "data" else app)
        words = words[words[0] == "data" :]
        while words and words[0] in getattr(found, "commands", {}):
            found = found.commands[words.pop(0)]
        assert not hasattr(found, "commands"), f"{file}: {command}"
        known = {option for parameter in found.params for option in parameter.opts} | {"--help"}
        given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert given <= known, f"{file}: {command}"


def test_recipes_named_in_commands_exist():
    named = set()
    for _, command in dualtrain_commands():
        match = re.search(
            r"dualtrain (?:run|sweep) (?:--dry-run )?(?!runs/)([a-z0-9][\w/.-]*)", command
        )
        if match and not match[1].endswith(".yaml"):
            named.add(match[1])
    assert len(named) >= 3
    for name in named:
        find_recipe(name)


def test_links_lead_somewhere():
    for file in DOORS:
        text = re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            there = (file.parent / path).resolve() if path else file
            assert there.exists(), f"{file.relative_to(ROOT)}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
                slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
                assert anchor in slugs, f"{file.relative_to(ROOT)}: {target}"


def test_what_others_report_is_held_by_tests_that_exist():
    tests = ROOT / "tests"
    part = (tests / "README.md").read_text().partition("## What others report")[2]
    rows = [line for line in part.partition("\n## ")[0].splitlines() if line.startswith("| ")][1:]
    link = r"\[([\w.-]+/[\w.-]+)#(\d+)\]\(https://github.com/\1/(?:issues|pull)/\2\)"
    assert len(rows) >= 10
    for row in rows:
        found = re.fullmatch(rf"\| .+ \| {link} \| `(?P<file>.+\.py)::(?P<test>\w+)` \|", row)
        assert found, row
        assert f"\ndef {found['test']}(" in (tests / found["file"]).read_text(), row


def test_ci_runs_the_readmes_test_command():
    commands = [text.strip() for text in blocks_of(README, "bash")]
    assert any(command in (ROOT / ".ci" / "run").read_text() for command in commands)


def test_example_algorithm_works():
    blocks = blocks_of(ROOT / "dualtrain" / "algorithms" / "README.md", "python")
    code = next(block for block in blocks if "class Scale(Algorithm)" in block)
    names: dict[str, type] = {}
    exec(code, names)
    algorithm = names["Scale"](factor=0.5)
    assert not algorithm.match(Event.FIT_START, None)


if __name__ == "__main__":
    for part, (file, _) in GENERATED.items():
        file.write_text(written_anew(part, file.read_text()))
