"""Tests of: dualtrain.method.objectives: its mean over all masks of tiny cases, enumerated."""

import math
from collections import Counter
from dataclasses import dataclass
from itertools import combinations, permutations, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dualtrain.common.vocabulary import Vocabulary
from dualtrain.method.objectives import MaskingNoise, diffusion
from dualtrain.recipe.schema import UniformCorruption

MASK, SPECIAL = 4, (0, 1, 2, 3, 4)
UNIFORM = UniformCorruption()
UNSMOOTHED = UniformCorruption(smoothing=0)
T = 5


@dataclass(frozen=True)
class Row:
    """A row of T inputs, and where its documents begin. Of targets only their places matter."""

    inputs: tuple[int, ...]
    begins: tuple[int, ...] = (0,)

    @property
    def documents(self) -> list[int]:
        return [sum(begin <= i for begin in self.begins) - 1 for i in range(len(self.inputs))]

    @property
    def ordinary(self) -> list[int]:
        return [i for i, token in enumerate(self.inputs) if token not in SPECIAL]

    @property
    def predicted(self) -> list[int]:
        """Ordinary inputs that have one of the same document before them."""
        return [i for i in self.ordinary if i not in self.begins]

    @property
    def hidden(self) -> list[int]:
        """Positions of documents' last inputs, which predict what is no input."""
        return [begin - 1 for begin in self.begins[1:]] + [len(self.inputs) - 1]


ROWS = {
    "ordinary": Row((7, 8, 9, 10, 11)),
    "with special tokens": Row((1, 8, 9, 0, 11)),
    "of two documents": Row((7, 8, 1, 10, 11), (0, 2)),
    "of pieces of three": Row((7, 8, 9, 10, 11), (0, 1, 3)),
}
EVERY_ROW = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def corrupt(row, noise, corruption, **options):
    count, length = noise.order.shape
    inputs = torch.tensor([row.inputs]).expand(count, -1)
    targets = torch.cat([inputs[:, 1:], torch.full((count, 1), 12)], dim=1)
    documents = torch.tensor([row.documents], dtype=torch.int32).expand(count, -1)
    batch = SimpleNamespace(
        inputs=inputs, targets=targets, document_ids=documents, context_ids=documents
    )
    ids = Vocabulary(size=13, special_ids=SPECIAL, bos_id=1, eos_id=2, mask=MASK)
    return diffusion(batch, ids, noise, corruption, **options)


class Table:
    """A made-up model: any cross-entropy for each token under each set of masked tokens."""

    def __init__(self, length=T):
        # Inputs first, then what follows each position without being an input.
        self.values = np.random.default_rng(length).uniform(0.5, 6, (1 << length, 2 * length))

    def entropy(self, masked, token):
        """Cross-entropy of input `token`, when the given inputs are masked."""
        return self.values[sum(1 << i for i in masked), token]

    def entropy_after(self, masked, position):
        """Cross-entropy of the hidden target of a position."""
        return self.values[sum(1 << i for i in masked), self.values.shape[1] // 2 + position]


class TrueConditionals:
    """The perfect model of a random distribution over x_0..x_T of two values each."""

    def __init__(self, length, values=None):
        self.length, self.values = length, values or (0,) * (length + 1)
        joint = np.random.default_rng(length).dirichlet(np.ones(1 << (length + 1)))
        self.joint = joint.reshape((2,) * (length + 1))

    def entropy(self, masked, token):
        seen = {*range(self.length)} - {*masked}
        return self.log_likelihood(seen) - self.log_likelihood(seen | {token})

    def entropy_after(self, masked, position):
        return self.entropy(masked, self.length)

    def log_likelihood(self, seen):
        """log p of those of x_0..x_T."""
        unseen = tuple({*range(self.length + 1)} - {*seen})
        at = tuple(self.values[i] for i in sorted(seen))
        return float(np.log(self.joint.sum(axis=unseen)[at]))


def mean_entropy(model, row, may, count):
    """m_k: mean over all sets of `count` masked tokens, and over the tokens of each.

    A masked token that nothing in its row predicts is not scored.
    """
    sets = list(combinations(may, count))
    total = sum(model.entropy(s, i) for s in sets for i in s if i not in row.begins)
    return total / (count * len(sets))


def mean_after(model, may, count, position):
    sets = list(combinations(may, count))
    return sum(model.entropy_after(s, position) for s in sets) / len(sets)


def integrate(function):
    """Over t from 0 to 1; exact for a polynomial of degree below 32."""
    nodes, weights = np.polynomial.legendre.leggauss(16)
    pairs = zip((nodes + 1) / 2, weights / 2, strict=True)
    return sum(weight * function(t) for t, weight in pairs)


def bound(model, row, may):
    """The integral over t of 1/t Σ_masked CE, each of the tokens masked with probability t."""

    def integrand(t):
        return sum(
            t ** (k - 1) * (1 - t) ** (len(may) - k) * model.entropy(s, i)
            for k in range(1, len(may) + 1)
            for s in combinations(may, k)
            for i in s
            if i not in row.begins
        )

    return integrate(integrand)


def expected_loss(model, row, rates, corruption, *, rounding=0.0, target="next", exact=False):
    """Σ w·CE of a row, averaged over every order of the positions and every rate.

    Args:
        rates: Probability of each u.
        rounding: u'.

    Returns:
        What the inputs' tokens have of it, and by position what hidden targets have.
    """
    length = len(row.inputs)
    inside, after = 0.0, dict.fromkeys(row.hidden, 0.0)
    orders = torch.tensor(list(permutations(range(length))), dtype=torch.float64)
    for rate, chance in rates.items():
        full = torch.full((len(orders),), rate, dtype=torch.float64)
        noise = MaskingNoise(full, torch.full_like(full, rounding), orders)
        example = corrupt(row, noise, corruption, target=target, exact=exact)
        pairs = zip(example.input_ids.tolist(), example.weights.tolist(), strict=True)
        # Many orders mask the same tokens, always with the same weights.
        for (inputs, weights), times in Counter((tuple(i), tuple(w)) for i, w in pairs).items():
            masked = [i for i in range(length) if inputs[i] == MASK]
            share = chance * times / len(orders)
            for i, weight in enumerate(weights):
                if weight and target == "next" and i in after:
                    after[i] += share * weight * model.entropy_after(masked, i)
                elif weight:
                    inside += share * weight * model.entropy(masked, i + (target == "next"))
    return inside, after


def published_chances(length):
    """P(max(1, floor(T·u + u')) = k), from the areas of u and u' that give each k."""
    chances = {k: 1 / length for k in range(1, length + 1)}
    chances[1] += 1 / (2 * length)
    chances[length] -= 1 / (2 * length)
    return chances


def capped_chances(length, most):
    """The same where no more than `most` tokens can be masked."""
    chances = published_chances(length)
    capped = {k: chances[k] for k in range(1, most)}
    capped[most] = sum(chances[k] for k in range(most, length + 1))
    return capped


def rates_for(chances, length):
    """Rates that give each number of masked tokens without rounding: T·u = k + 1/2."""
    return {(count + 0.5) / length: chance for count, chance in chances.items()}


def even_rates(most):
    """Rates that give each number of `most` tokens the same chance, with rounding 1."""
    return {(k - 0.5) / most: 1 / most for k in range(1, most + 1)}


# Training


def test_numbers_of_masked_tokens_have_the_published_chances():
    length, grid = 4, 128
    points = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    rate, rounding = (axis.flatten() for axis in torch.meshgrid(points, points, indexing="ij"))
    noise = MaskingNoise(rate, rounding, torch.arange(4.0).expand(len(rate), 4))
    numbers = (corrupt(Row((7, 8, 9, 10)), noise, UNIFORM).input_ids == MASK).sum(dim=1)
    for count, chance in published_chances(length).items():
        # The two edges of an area cut at most one cell in each row of the grid.
        assert (numbers == count).double().mean().item() == pytest.approx(chance, abs=2 / grid)


@EVERY_ROW
def test_training_loss_is_unbiased_for_the_published_estimate(row):
    """Equal to T·Σ P(k)·m_k and hidden targets, and off the bound by what the module says."""
    model, most = Table(), len(row.ordinary)
    inside, after = expected_loss(model, row, rates_for(published_chances(T), T), UNSMOOTHED)
    means = {k: mean_entropy(model, row, row.ordinary, k) for k in range(1, most + 1)}

    chances = capped_chances(T, most)
    wanted = T * sum(chance * means[k] for k, chance in chances.items())
    assert inside == pytest.approx(wanted, rel=1e-6)
    surplus = means[1] / 2 + (T - most - 0.5) * means[most]
    assert sum(means.values()) == pytest.approx(bound(model, row, row.ordinary), rel=1e-9)
    assert inside == pytest.approx(sum(means.values()) + surplus, rel=1e-6)

    assert after.keys() == set(row.hidden)
    for position, loss in after.items():
        # The row's last target weighs 1/p = T/k, like masked tokens; other hidden ones weigh 1.
        wanted = sum(
            chance
            * (T / k if position == T - 1 else 1)
            * mean_after(model, row.ordinary, k, position)
            for k, chance in chances.items()
        )
        assert loss == pytest.approx(wanted, rel=1e-6)


def test_smoothing_lowers_the_expected_loss_by_its_known_factor():
    model, smoothing, row = Table(), 0.1, ROWS["of pieces of three"]
    chances = published_chances(T)
    inside, after = expected_loss(
        model, row, rates_for(chances, T), UniformCorruption(smoothing=smoothing)
    )
    factors = {k: 1 / (1 + smoothing * (1 - k / T) / (k / T)) for k in chances}
    wanted = T * sum(
        chance * factors[k] * mean_entropy(model, row, row.ordinary, k)
        for k, chance in chances.items()
    )
    assert inside == pytest.approx(wanted, rel=1e-6)
    last = sum(
        chance * factors[k] * T / k * mean_after(model, row.ordinary, k, T - 1)
        for k, chance in chances.items()
    )
    first = sum(chance * mean_after(model, row.ordinary, k, 0) for k, chance in chances.items())
    assert (after[T - 1], after[0]) == pytest.approx((last, first), rel=1e-6)


@pytest.mark.parametrize("length", [16, 256])
def test_the_rows_last_target_counts_about_ln_T_and_one_times(length):
    grid = 64
    rate = (torch.arange(length * grid, dtype=torch.float64) + 0.5) / (length * grid)
    rounding = (torch.arange(length * grid, dtype=torch.float64) * 0.6180339887) % 1
    noise = MaskingNoise(rate, rounding, torch.rand(length * grid, length, dtype=torch.float64))
    row = Row(tuple(range(5, 5 + length)))
    weight = corrupt(row, noise, UNIFORM).weights[:, -1].double().mean().item()
    harmonic = sum(1 / k for k in range(1, length + 1))
    assert weight == pytest.approx(harmonic + 0.5 - 0.5 / length, rel=0.03)
    assert weight == pytest.approx(math.log(length) + 1, rel=0.04)


# exact=True


@EVERY_ROW
def test_exact_is_unbiased_for_the_bound(row):
    """With rounding 1, as in validation_noise, u ~ U(0, 1) gives k = 1..M equal chances."""
    model, may = Table(), row.predicted
    rates = even_rates(len(may))
    inside, after = expected_loss(model, row, rates, UNIFORM, rounding=1.0, exact=True)
    assert inside == pytest.approx(bound(model, row, may), rel=1e-6)
    means = [mean_entropy(model, row, may, k) for k in range(1, len(may) + 1)]
    assert inside == pytest.approx(sum(means), rel=1e-6)
    # Hidden targets count once, averaged over the masks.
    assert after.keys() == set(row.hidden)
    for position, loss in after.items():
        wanted = np.mean([mean_after(model, may, k, position) for k in range(1, len(may) + 1)])
        assert loss == pytest.approx(wanted, rel=1e-6)


@EVERY_ROW
def test_exact_in_place_is_unbiased_for_the_bound_of_all_inputs(row):
    model, may = Table(), row.ordinary
    inside, _ = expected_loss(
        model, row, even_rates(len(may)), UNIFORM, rounding=1.0, target="in_place", exact=True
    )
    wanted = sum(
        np.mean([model.entropy(s, i) for s in combinations(may, k) for i in s])
        for k in range(1, len(may) + 1)
    )
    assert inside == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("target", ["next", "in_place"])
def test_exact_loss_of_a_perfect_model_is_the_negative_log_likelihood(target):
    """Tokens recovered in any order have the same likelihood, which is the bound's tight case."""
    model, row = TrueConditionals(T), Row((1, 8, 9, 10, 11))
    inside, _ = expected_loss(
        model, row, even_rates(4), UNIFORM, rounding=1.0, target=target, exact=True
    )
    wanted = model.log_likelihood([0]) - model.log_likelihood(range(T))
    assert inside == pytest.approx(wanted, rel=1e-6)


def test_exact_loss_of_a_perfect_model_bounds_what_ar_scores():
    """Over all texts of its distribution; for one text it may be lower."""
    length, may, row = 3, (1, 2), Row((7, 8, 9))
    loss = ar = after = last = at_any_turn = 0.0
    is_lower = set()
    for values in product((0, 1), repeat=length + 1):
        model = TrueConditionals(length, values)
        chance = float(model.joint[values])
        inside, hidden_ones = expected_loss(
            model, row, even_rates(len(may)), UNIFORM, rounding=1.0, exact=True
        )
        (hidden,) = hidden_ones.values()
        likelihood = model.log_likelihood([0]) - model.log_likelihood(range(length + 1))
        is_lower.add(inside + hidden < likelihood)
        loss += chance * (inside + hidden)
        ar += chance * likelihood
        after += chance * hidden
        last += chance * model.entropy((), length)
        at_any_turn += chance * np.mean([mean_after(model, may, k, 2) for k in range(3)])
    assert ar < loss < 1.1 * ar and is_lower == {True, False}
    # All of the gap is the hidden target's. It is predicted when 1..M others are masked, never
    # when none is, so it costs more than at a random turn among all.
    assert loss - ar == pytest.approx(after - last, rel=1e-6)
    assert last < at_any_turn < after
