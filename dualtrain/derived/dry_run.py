"""The dry run: a recipe with the origin of every value, and what follows from it.

Called for ``dualtrain run --dry-run``. Without a terminal the same text is printed, without
colours. The first part is YAML that can be saved as a recipe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from textwrap import wrap

from rich.console import Console
from rich.text import Text

from dualtrain.common.cpu import has_bfloat16, has_gpu
from dualtrain.common.formatting import size
from dualtrain.derived.derive import Derived
from dualtrain.engine.groups import ParameterGroup, describe_group, name_patterns
from dualtrain.recipe.load import LoadedRecipe
from dualtrain.recipe.schema import OptimSection, Recipe
from dualtrain.recipe.yaml_source import dotted, parse

MAX_WIDTH = 100
COMMENT_COLUMN = 52
_COMPILE_STEPS = 300
"""Steps after which compiling was worth it for the quickstart: 22 s, some 0.1 s a step."""

Row = tuple[str, str, str]
"""Name, value, reason."""


def print_dry_run(
    loaded: LoadedRecipe, derived: Derived, *, console: Console | None = None
) -> None:
    """Print the resolved recipe, the derived numbers, the parameter groups, and warnings.

    Args:
        console: Where to print; standard output by default.
    """
    out = console or Console(highlight=False)
    width = min(out.width, MAX_WIDTH)
    out.print(Text(f"# {loaded.source}, resolved", style="bold"), soft_wrap=True)
    for line in annotated_lines(loaded):
        out.print(line, soft_wrap=True)
    out.print()
    out.print(Text("# What follows", style="bold"))
    rows = [*derived_rows(derived), *machine_rows(loaded.recipe, derived.steps)]
    for line in table_lines(rows, width):
        out.print(line, soft_wrap=True)
    if derived.cost is not None:
        out.print()
        out.print(Text("# Parameter groups", style="bold"))
        for line in table_lines(list(group_rows(derived.cost.groups, loaded.recipe.optim)), width):
            out.print(line, soft_wrap=True)
    for warning in derived.warnings:
        text = "\n".join(wrap(f"warning: {warning}", width))
        out.print(Text(text, style="yellow"), soft_wrap=True)


def annotated_lines(loaded: LoadedRecipe) -> Iterator[Text]:
    """The lines of the resolved recipe; where a value is no default, its file and line follow."""
    tree, _ = parse(loaded.text, "")
    paths = {place.line: dotted(path) for path, place in tree.leaves()}
    for number, line in enumerate(loaded.text.splitlines(), start=1):
        key = paths.get(number, "")
        # A list on one line stands for its items.
        origin = loaded.origins.get(key) or loaded.origins.get(key.rpartition(".")[0], "")
        if origin:
            yield Text.assemble(f"{line:<{COMMENT_COLUMN}}", (f"  # {origin}", "dim"))
        else:
            yield Text(line)


def table_lines(rows: list[Row], width: int) -> Iterator[Text]:
    """Lay rows out in columns, reasons wrapped into what is left of the width."""
    names, values = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)
    indent = names + values + 4
    for name, value, reason in rows:
        first, *rest = wrap(reason, max(20, width - indent)) or [""]
        yield Text.assemble(f"{name:<{names}}  {value:>{values}}", (f"  {first}".rstrip(), "dim"))
        for line in rest:
            yield Text(" " * indent + line, style="dim")


def derived_rows(derived: Derived) -> Iterator[Row]:
    """The rows of the table."""
    reasons = derived.reasons
    yield "steps", f"{derived.steps:,}", reasons["steps"]
    yield "unique tokens", f"{derived.unique_tokens:,}", reasons["unique_tokens"]
    yield "repetitions", f"{derived.repetitions:.6g}", reasons["repetitions"]
    yield "tokens a step", f"{derived.tokens_per_step:,}", reasons["tokens_per_step"]
    yield "tokens in all", f"{derived.total_tokens:,}", "steps x tokens a step"
    yield "slots a step", f"{derived.slots_per_step:,}", reasons["slots_per_step"]
    slots = derived.ar_slots + derived.diffusion_slots
    yield "AR slots", f"{derived.ar_slots:,}", f"of {slots:,} in the run; {reasons['ar_slots']}"
    yield "diffusion slots", f"{derived.diffusion_slots:,}", "the others"
    yield "AR passes a token", f"{derived.ar_passes:.6g}", reasons["ar_passes"]
    for piece in derived.milestones:
        yield f"learning rate at {piece.step:,}", f"{piece.learning_rate:.3g}", piece.what
    yield from _cost_rows(derived)


def machine_rows(recipe: Recipe, steps: int) -> Iterator[Row]:
    """What this machine's CPU means for the run; nothing where a GPU takes it."""
    if has_gpu():
        return
    if not has_bfloat16():
        lacking = "on this CPU, which has no bf16 instructions"
        if recipe.optim.name == "muon":
            yield "Newton-Schulz", "fp32", lacking
        if recipe.engine.precision == "bf16":
            yield "engine.precision", "bf16", f"less than half as fast as fp32 {lacking}"
    if steps >= _COMPILE_STEPS and not recipe.model.compile:
        reason = "model.compile=true is some 1.2 x as fast here, where there is a C++ compiler"
        yield "model.compile", "false", reason


def group_rows(groups: Sequence[ParameterGroup], optim: OptimSection) -> Iterator[Row]:
    """The rows of the optimizer's groups: what each has, its values and its parameters."""
    for group in groups:
        number, values = describe_group(group, optim)
        yield group.label, number, f"{values}: {name_patterns(group.names)}"


def _cost_rows(derived: Derived) -> Iterator[Row]:
    cost = derived.cost
    if derived.imported is not None:
        yield "imported model", *derived.imported
    if cost is None:
        yield "parameters", "unknown", "the vocabulary is the dataset's, which is not there yet"
        return
    without = f"{cost.without_vocabulary:,} without embedding and output matrix"
    yield "parameters", f"{cost.parameters:,}", without
    if cost.muon_parameters:
        rest = cost.parameters - cost.muon_parameters
        yield "of them Muon's", f"{cost.muon_parameters:,}", f"AdamW has the other {rest:,}"
    yield "training operations", f"{cost.training_flops:.2e}", "FLOP, forward and backward"
    yield (
        "a checkpoint",
        size(cost.checkpoint_bytes),
        "estimate: weights, fp32 masters, states",
    )
    memory = cost.memory
    ranks = "the only rank" if derived.world_size == 1 else f"each of {derived.world_size} ranks"
    parts = (
        f"weights {size(memory.weights)}, gradients {size(memory.gradients)}, "
        f"optimizer {size(memory.optimizer)}, activations {size(memory.activations)}"
    )
    if memory.host:
        parts += f"; {size(memory.host)} of host memory"
    stage = f"ZeRO stage {derived.zero_stage}, {ranks}"
    yield "memory of a rank", size(memory.total), f"rough estimate, {stage}: {parts}"
