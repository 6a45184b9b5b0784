"""Very small trained models, one of each head and an imported one, and their exports."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.imported import loader
from helpers.runs import tiny_loader, train_on

from dualtrain.checkpoint.trained import TrainedModel, open_trained
from dualtrain.export.command import ExportOptions
from dualtrain.export.export import Exported, export_checkpoint
from dualtrain.network.attention import plan_attention

SHORT = ("steps=3", "optim.lr=0.02", "eval.sequences=4", "sample.tokens=0", "sample.infill=''")


@dataclass
class Case:
    """A run and its export."""

    run_dir: Path
    exported: Exported
    trained: TrainedModel
    """From the checkpoint."""

    @property
    def directory(self) -> Path:
        return self.exported.directory

    def logits(self, ids: torch.Tensor, kind: str = "causal", prefix: int | None = None):
        """What the trained model itself computes for rows without padding."""
        in_prefix = None
        if prefix is not None:
            in_prefix = (torch.arange(ids.shape[1]) < prefix).expand(ids.shape)
        plan = plan_attention(
            kind,
            torch.zeros(ids.shape, dtype=torch.int32),
            backend="sdpa",
            device="cpu",
            in_prefix=in_prefix,
        )
        with torch.no_grad():
            return self.trained.model(ids, attention=plan).logits


@pytest.fixture(scope="session")
def cases(tiny_dataset, published, tmp_path_factory) -> dict[str, Case]:
    """By head, and an imported GPT-2. The linear one was trained by ZeRO 3, to predict in place."""
    folder = tmp_path_factory.mktemp("export")
    load = tiny_loader(tiny_dataset, folder)
    recipes = {
        "paper": load(*SHORT, "checkpoint.interval_steps=2", name="paper-run"),
        "linear": load(
            *SHORT,
            "model.head=linear",
            "objective.target=in_place",
            "engine.deepspeed=zero3",
            "checkpoint.at.words=[1]",
            name="linear-run",
        ),
    }
    gpt2, _, text = published
    load_import = loader(folder, gpt2, text)
    recipes["imported"] = load_import(*SHORT, "steps=2", name="imported-run")
    assert train_on(1, folder, *recipes.values()) == [0, 0, 0]
    cases = {}
    for head, recipe in recipes.items():
        run_dir = recipe.recipe.directory
        exported = export_checkpoint(ExportOptions(path=run_dir, to=folder / f"{head}-export"))
        cases[head] = Case(run_dir, exported, open_trained(run_dir, device="cpu"))
    return cases


@pytest.fixture(params=["paper", "linear"])
def case(request, cases) -> Case:
    return cases[request.param]


@pytest.fixture
def paper(cases) -> Case:
    return cases["paper"]
