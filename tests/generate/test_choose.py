"""Tests of: dualtrain.generate.choose, and the ranges of dualtrain.generate.settings.

Choosing tokens is checked against transformers' warpers, and against the probabilities.
"""

import math

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dualtrain.common.errors import UserError
from dualtrain.generate.choose import (
    banned_tokens,
    choose,
    draw,
    keep_top_k,
    keep_top_p,
    penalise,
)
from dualtrain.generate.settings import Settings


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    """(40, 1000), from flat to very sharp, some of it banned."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 1000, generator=generator) * torch.linspace(0.1, 8, 40)[:, None]
    logits[:, ::7] = -torch.inf
    return logits


@pytest.mark.parametrize("k", [1, 2, 50, 999, 5000])
def test_top_k_is_that_of_transformers(logits, k):
    assert torch.equal(keep_top_k(logits, k), TopKLogitsWarper(k)(None, logits))


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_top_p_is_that_of_transformers(logits, p):
    kept = keep_top_p(logits, p)
    assert torch.equal(kept, TopPLogitsWarper(p)(None, logits))
    assert (kept > -torch.inf).any(-1).all()


def test_top_p_leaves_the_fewest_that_reach_it():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    for p, kept in ((0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 2, 3])):
        assert keep_top_p(logits, p)[0].isfinite().nonzero()[:, 0].tolist() == kept
    equal = torch.zeros(1, 4)
    assert keep_top_p(equal, 0.5)[0].isfinite().tolist() == [True, True, False, False]


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty_is_that_of_transformers(logits, penalty):
    ids = torch.randint(0, 1000, (40, 60), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(40, 1000, dtype=torch.bool).scatter_(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    assert torch.equal(penalise(logits, seen, penalty), expected)


def test_settings_are_applied_in_the_order_of_transformers(logits):
    """Temperature, then top-k, then top-p: what can be drawn is what they leave."""
    settings = Settings(temperature=3.0, top_k=40, top_p=0.8)
    warped = TopPLogitsWarper(0.8)(None, TopKLogitsWarper(40)(None, logits / 3.0))
    numbers = np.linspace(0, 1, 4000, endpoint=False)
    for row in (0, 20, 39):
        rows = logits[row].expand(len(numbers), -1)
        drawn = choose(rows, settings, torch.from_numpy(numbers))
        # Evenly spaced numbers meet every token whose probability exceeds their distance.
        probabilities = warped[row].softmax(-1)
        expected = set((probabilities > 1 / 2000).nonzero()[:, 0].tolist())
        found = set(drawn.tolist())
        assert expected <= found <= set(warped[row].isfinite().nonzero()[:, 0].tolist())
        counts = torch.bincount(drawn, minlength=1000) / len(numbers)
        torch.testing.assert_close(counts, probabilities, atol=1 / 2000, rtol=0)


def test_the_ends_of_the_distribution():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    below_one = math.nextafter(1.0, 0.0)
    drawn = draw(
        logits.expand(4, -1), torch.tensor([0.0, 0.49, 0.51, below_one], dtype=torch.float64)
    )
    assert drawn.tolist() == [1, 1, 3, 3]
    # 1.0 is what rounding makes of a number below 1 where the probabilities add up to more.
    assert draw(logits, torch.ones(1, dtype=torch.float64)).item() == 3


def test_temperature_0_takes_the_first_of_the_likeliest(logits):
    assert torch.equal(choose(logits, Settings(temperature=0), None), logits.argmax(-1))
    assert choose(torch.zeros(1, 5), Settings(temperature=0), None).item() == 0


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1000.0])
def test_the_ends_of_the_temperature_draw_from_what_is_allowed(logits, temperature):
    numbers = torch.linspace(0, 0.999, 40, dtype=torch.float64)
    drawn = choose(logits, Settings(temperature=temperature, top_p=0.9), numbers)
    assert logits.gather(1, drawn[:, None]).isfinite().all()


@pytest.mark.parametrize("temperature", [1e-7, 1e-40, 1e-320])
def test_next_to_0_is_greedy(logits, temperature):
    settings = Settings(temperature=temperature)
    assert settings.is_greedy
    assert torch.equal(choose(logits, settings, None), logits.argmax(-1))


def test_banned_tokens():
    banned = banned_tokens(8, 6, (0, 3), torch.device("cpu"))
    assert banned.nonzero()[:, 0].tolist() == [0, 3, 6, 7]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "--temperature: -0.1 — expected 0 to 1000, where all tokens"),
        ({"temperature": 1e300}, r"--temperature: 1e\+300 — expected 0 to 1000"),
        ({"temperature": math.inf}, "--temperature: inf"),
        ({"temperature": math.nan}, "--temperature: nan"),
        ({"top_k": 0}, "--top-k: 0 — expected 1 or more"),
        ({"top_p": 0.0}, r"--top-p: 0 — expected a number in \(0, 1\]"),
        ({"top_p": 1.1}, "--top-p: 1.1"),
        ({"top_p": math.nan}, "--top-p: nan"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty: 0 — expected 0.01 to 100; 1 changes"),
        ({"repetition_penalty": 1e39}, "--repetition-penalty: 1e"),
        ({"repetition_penalty": math.nan}, "--repetition-penalty: nan"),
    ],
)
def test_values_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Settings(**settings)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(UserError, match="(?s)--top-k.*--temperature.*--top-p"):
        Settings(temperature=-1, top_k=-1, top_p=2)
