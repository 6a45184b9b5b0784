"""Small models with nothing left at zero."""

from collections.abc import Callable

import pytest
from helpers.models import add_noise

from dualtrain.network.config import DualConfig
from dualtrain.network.transformer import DualLM


@pytest.fixture
def tiny_config() -> Callable[..., DualConfig]:
    def make(**changes: object) -> DualConfig:
        sizes = {
            "vocab_size": 96,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 44,
        }
        return DualConfig(**(sizes | changes))

    return make


@pytest.fixture
def tiny_model(tiny_config) -> Callable[..., DualLM]:
    """A model whose every parameter matters: new ones ignore attention, its output being zero."""

    def make(**changes: object) -> DualLM:
        return add_noise(DualLM(tiny_config(**changes)), 0.2)

    return make
