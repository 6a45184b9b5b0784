"""Small models with nothing left at zero."""

from collections.abc import Callable

import pytest
import torch

from dualtrain.network.config import DualConfig
from dualtrain.network.transformer import DualLM


@pytest.fixture
def tiny_config() -> Callable[..., DualConfig]:
    def make(**changes: object) -> DualConfig:
        sizes = {"vocab_size": 96, "width": 32, "layers": 2, "heads": 2, "mlp_width": 44}
        return DualConfig(**(sizes | changes))

    return make


@pytest.fixture
def tiny_model(tiny_config) -> Callable[..., DualLM]:
    """A model whose every parameter matters: new ones ignore attention, its output being zero."""

    def make(**changes: object) -> DualLM:
        model = DualLM(tiny_config(**changes))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise, alpha=0.2)
        return model

    return make
