"""Checkpoints that were tampered with."""

from __future__ import annotations

from pathlib import Path

import torch

from dualtrain.checkpoint.files import FileFacts, hash_file, read_marker, write_marker


def zero_momentum(checkpoint: Path) -> None:
    """Make a checkpoint in which Muon has forgotten everything, with hashes that agree."""
    zeroed = 0
    for file in sorted((checkpoint / "deepspeed").iterdir()):
        content = torch.load(file, weights_only=False)
        for state in optimizer_states(content):
            if "momentum_buffer" in state:
                zeroed += int(state["momentum_buffer"].zero_().numel() > 0)
        torch.save(content, file)
    assert zeroed
    reseal(checkpoint)


def optimizer_states(content: dict) -> list[dict]:
    """The states in one of DeepSpeed's files, whatever the stage."""
    found, todo = [], [content]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            found += [value] if "momentum_buffer" in value else []
            todo += value.values()
    return found


def reseal(checkpoint: Path) -> None:
    """Write a marker that agrees with the files as they are now."""
    files = read_marker(checkpoint)
    facts = {
        name: FileFacts((checkpoint / name).stat().st_size, hash_file(checkpoint / name))
        for name in files
    }
    write_marker(checkpoint, facts)
