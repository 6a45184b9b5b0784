"""Which parameters share a learning rate, and how that is reported. Needs no torch.

Muon. DeepSpeed's Muon scales an orthogonalised update by sqrt(max(1, rows/cols)); the paper scales
it by 0.2 * sqrt(max(rows, cols)). One parameter group per matrix shape turns the one into the other
exactly: lr_group = lr * scale with scale = 0.2 * sqrt(max(r, c)) / sqrt(max(1, r/c)), and
weight_decay_group = weight_decay / scale, so that decay stays p <- p * (1 - lr * weight_decay).

``engine`` gives the groups to DeepSpeed, the dry run and a run's ``logs/parameters.txt`` show them.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dualtrain.recipe.schema import OptimSection


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate.

    Attributes:
        label: For the log and the dry run, such as ``muon 512x192``.
        lr_scale: Factor between the recipe's learning rate and this group's.
    """

    label: str
    names: tuple[str, ...]
    lr_scale: float
    uses_muon: bool
    elements: int


def muon_scale(rows: int, cols: int) -> float:
    """Factor from DeepSpeed's Muon update to the paper's for a matrix (rows, cols)."""
    return 0.2 * sqrt(max(rows, cols)) / sqrt(max(1.0, rows / cols))


def group_parameters(
    shapes: Mapping[str, tuple[int, ...]], muon_names: Iterable[str]
) -> list[ParameterGroup]:
    """Divide parameters into one group per Muon matrix shape and one for AdamW."""
    chosen = set(muon_names)
    by_shape: dict[tuple[int, int], list[str]] = defaultdict(list)
    rest: list[str] = []
    for name, shape in shapes.items():
        if name in chosen:
            rows, cols = shape
            by_shape[rows, cols].append(name)
        else:
            rest.append(name)
    groups = [
        ParameterGroup(
            f"muon {rows}x{cols}",
            tuple(names),
            muon_scale(rows, cols),
            uses_muon=True,
            elements=len(names) * rows * cols,
        )
        for (rows, cols), names in by_shape.items()
    ]
    if rest:
        elements = sum(prod(shapes[name]) for name in rest)
        groups.append(ParameterGroup("adamw", tuple(rest), 1.0, uses_muon=False, elements=elements))
    return groups


def describe_group(group: ParameterGroup, optim: OptimSection) -> tuple[str, str]:
    """Say in words how many parameters a group has, and what it is updated with.

    Returns:
        Such as ``17 matrices`` and ``278,528 parameters; lr 0.01584 (2.263 x optim.lr), weight
        decay 0.04419``, with the learning rate at its peak.
    """
    kind = ("matrix", "matrices") if group.uses_muon else ("tensor", "tensors")
    number = f"{len(group.names)} {kind[len(group.names) != 1]}"
    scale = "" if group.lr_scale == 1 else f" ({group.lr_scale:.4g} x optim.lr)"
    values = (
        f"{group.elements:,} parameters; lr {optim.lr * group.lr_scale:.4g}{scale}, "
        f"weight decay {optim.weight_decay / group.lr_scale:.4g}"
    )
    return number, values


def summarise_groups(groups: Sequence[ParameterGroup]) -> str:
    """All groups in a line, such as ``muon 192x192 (17), muon 512x192 (8), adamw (12)``."""
    return ", ".join(f"{group.label} ({len(group.names)})" for group in groups)


def list_groups(groups: Sequence[ParameterGroup], optim: OptimSection) -> Iterator[str]:
    """Lines that describe every group and name all its parameters."""
    for group in groups:
        number, values = describe_group(group, optim)
        yield f"{group.label}: {number}, {values}"
        yield from (f"  {name}" for name in group.names)


def name_patterns(names: Iterable[str]) -> str:
    """Names in short, numbers of layers as ``*``: ``model.layers.*.mlp.up_proj.weight (24)``."""
    patterns = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    return ", ".join(f"{p} ({n})" if "*" in p else p for p, n in patterns.items())
