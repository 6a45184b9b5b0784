"""Where a run starts: its directory, its checkpoint if any, and what the ranks left in it.

``assemble`` makes one :class:`Origin` as soon as the ranks have met, before memory is spent: what
cannot be continued is refused here. ``resume`` chooses and compares, ``branch`` looks at the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualtrain.checkpoint import store as checkpoint
from dualtrain.checkpoint.resume import (
    Resume,
    agree_on_start,
    check_compatible,
    describe_change,
    share_rank_states,
    with_notes,
)
from dualtrain.data.corpus import CorpusFacts
from dualtrain.data.dataset import DatasetInfo
from dualtrain.derived.derive import Derived
from dualtrain.launch.world import World
from dualtrain.recipe.load import dump_recipe
from dualtrain.recipe.schema import Recipe
from dualtrain.training.branch import check_branch, inherit_metrics


@dataclass(frozen=True)
class Origin:
    """Where a run starts.

    Attributes:
        text: The recipe as YAML; goes into every checkpoint.
        fingerprint: The dataset's; a resumed run must have the same.
        resume: The checkpoint to start from, if any.
        facts: Its ``state.json``; empty unless the run continues one.
        rank_states: What was saved in it by this rank, or by all where their number was another.
        mine: What this rank continues with of them.
    """

    run_dir: Path
    text: str
    fingerprint: str
    resume: Resume
    facts: dict[str, Any]
    rank_states: list[dict[str, Any]]
    mine: dict[str, Any]

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        world: World,
        info: DatasetInfo,
        corpus: CorpusFacts,
        derived: Derived,
    ) -> Origin:
        """Choose and check it; every rank calls this."""
        run_dir, text = recipe.directory, dump_recipe(recipe)
        resume = agree_on_start(recipe.checkpoint.resume, run_dir, world)
        if world.rank == 0:
            checkpoint.remove_unfinished(run_dir)
        facts: dict[str, Any] = {}
        states: list[dict[str, Any]] = []
        mine: dict[str, Any] = {}
        if resume.path is not None and resume.continues:
            path = resume.path
            check_compatible(resume, recipe_text=text, fingerprint=info.fingerprint)
            facts = checkpoint.read_state(path)
            if resume.kind == "branch":
                resume = with_notes(resume, *check_branch(recipe, path, corpus))
                if world.rank == 0:
                    inherit_metrics(path.parent, run_dir, facts["step"])
            change = describe_change(
                path, world_size=world.world_size, zero_stage=derived.zero_stage
            )
            resume = with_notes(resume, change or f"from {path}, ranks and stage as before")
            states = checkpoint.load_rank_states(path, world)
            same = facts["world_size"] == world.world_size
            mine = states[0] if same else share_rank_states(states, world.rank)
        return cls(run_dir, text, info.fingerprint, resume, facts, states, mine)

    @property
    def first_step(self) -> int:
        """Updates done before this process started."""
        return self.facts.get("step", 0)

    @property
    def elapsed_s(self) -> float:
        """Wall time that the run took before this process started."""
        return self.facts.get("elapsed_s", 0.0)

    @property
    def skipped_steps(self) -> int:
        """Steps without an update so far."""
        return self.facts.get("skipped_steps", 0)

    @property
    def path(self) -> Path:
        """The checkpoint's directory, where there is one."""
        assert self.resume.path is not None
        return self.resume.path
