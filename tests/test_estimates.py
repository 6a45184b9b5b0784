"""What the diffusion loss estimates: its expectation over all masks of tiny cases, enumerated."""

from collections import Counter
from itertools import combinations, permutations

import numpy as np
import pytest
import torch

from dualtrain.objectives import MaskingNoise, diffusion
from dualtrain.recipe.schema import UniformCorruption

MASK, SPECIAL = 4, (0, 1, 2, 3, 4)
UNIFORM = UniformCorruption()
UNSMOOTHED = UniformCorruption(smoothing=0)


def corrupt(tokens, noise, corruption, **options):
    documents = torch.zeros(tokens.shape[0], tokens.shape[1] - 1, dtype=torch.int32)
    given = {"mask_id": MASK, "special_ids": SPECIAL} | options
    return diffusion(tokens, documents, noise=noise, corruption=corruption, **given)


class Table:
    """A made-up model: any cross-entropy for each token under each set of masked tokens."""

    def __init__(self, length):
        self.length = length
        self.values = np.random.default_rng(length).uniform(0.5, 6, (1 << length, length + 1))

    def entropy(self, masked, token):
        """Cross-entropy of token x_i, 0..T, when the given inputs are masked."""
        return self.values[sum(1 << i for i in masked), token]


class TrueConditionals:
    """The perfect model of a random distribution over x_0..x_T of two values each."""

    def __init__(self, length):
        self.length = length
        joint = np.random.default_rng(length).dirichlet(np.ones(1 << (length + 1)))
        self.joint = joint.reshape((2,) * (length + 1))

    def entropy(self, masked, token):
        return self.log_likelihood(masked) - self.log_likelihood(set(masked) - {token})

    def log_likelihood(self, masked):
        """log p of the inputs that are seen, all of them having the first value."""
        hidden = {*masked, self.length}
        return float(np.log(self.joint.sum(axis=tuple(hidden)).flat[0]))


def mean_entropy(model, ordinary, count, unscored=(0,)):
    """m_k: mean over all sets of `count` masked tokens, and over the tokens of each."""
    sets = list(combinations(ordinary, count))
    total = sum(model.entropy(s, i) for s in sets for i in s if i not in unscored)
    return total / (count * len(sets))


def mean_last(model, ordinary, count):
    sets = list(combinations(ordinary, count))
    return sum(model.entropy(s, model.length) for s in sets) / len(sets)


def bound(model, ordinary):
    """The integral over t of 1/t Σ_masked CE, each token masked with probability t; over T."""
    # A polynomial in t of degree below T: 16 nodes are exact.
    nodes, weights = np.polynomial.legendre.leggauss(16)
    total = 0.0
    for t, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        for count in range(1, len(ordinary) + 1):
            chance = t**count * (1 - t) ** (len(ordinary) - count)
            for s in combinations(ordinary, count):
                total += weight / t * chance * sum(model.entropy(s, i) for i in s if i != 0)
    return total / model.length


def expected_loss(model, row, rates, corruption, *, rounding=0.0, target="next", exact=False):
    """The loss averaged over every order of the positions and every rate.

    Args:
        rates: Probability of each u.
        rounding: u'.

    Returns:
        The share of the loss that the inputs' tokens have, and that of the token after them.
    """
    length = model.length
    inside = after = 0.0
    orders = torch.tensor(list(permutations(range(length))), dtype=torch.float64)
    tokens = torch.tensor([row]).expand(len(orders), -1)
    for rate, chance in rates.items():
        full = torch.full((len(orders),), rate, dtype=torch.float64)
        noise = MaskingNoise(full, torch.full_like(full, rounding), orders)
        example = corrupt(tokens, noise, corruption, target=target, exact=exact)
        pairs = zip(example.input_ids.tolist(), example.weights.tolist(), strict=True)
        # Many orders mask the same tokens, always with the same weights.
        for (inputs, weights), times in Counter((tuple(i), tuple(w)) for i, w in pairs).items():
            masked = [i for i in range(length) if inputs[i] == MASK]
            for i, weight in enumerate(weights):
                token = i + 1 if target == "next" else i
                if weight:
                    loss = weight * model.entropy(masked, token) / length * times / len(orders)
                    inside += chance * loss * (token < length)
                    after += chance * loss * (token == length)
    return inside, after


def published_chances(length):
    """P(max(1, floor(T·u + u')) = k), from the areas of u and u' that give each k."""
    chances = {k: 1 / length for k in range(1, length + 1)}
    chances[1] += 1 / (2 * length)
    chances[length] -= 1 / (2 * length)
    return chances


def rates_for(chances, length):
    """Rates that give each number of masked tokens without rounding: T·u = k + 1/2."""
    return {(count + 0.5) / length: chance for count, chance in chances.items()}


ROWS = pytest.mark.parametrize(
    "row", [(7, 8, 9, 10, 11, 12), (1, 8, 9, 1, 11, 12)], ids=["ordinary", "with special tokens"]
)
NO_SPECIAL, T = (7, 8, 9, 10, 11, 12), 5


def ordinary_positions(row):
    return [i for i in range(T) if row[i] not in SPECIAL]


def test_numbers_of_masked_tokens_have_the_published_chances():
    length, grid = 4, 128
    points = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    rate, rounding = (axis.flatten() for axis in torch.meshgrid(points, points, indexing="ij"))
    noise = MaskingNoise(rate, rounding, torch.arange(4.0).expand(len(rate), 4))
    tokens = torch.arange(5, 6 + length).expand(len(rate), -1)
    numbers = (corrupt(tokens, noise, UNIFORM).input_ids == MASK).sum(dim=1)
    for count, chance in published_chances(length).items():
        # The two edges of an area cut at most one cell in each row of the grid.
        assert (numbers == count).double().mean().item() == pytest.approx(chance, abs=2 / grid)


@ROWS
def test_training_loss_is_unbiased_for_the_published_estimate(row):
    """Equal to Σ P(k)·m_k and the last position, and off the bound by what the module says."""
    model, ordinary = Table(T), ordinary_positions(row)
    most, chances = len(ordinary), published_chances(T)
    inside, after = expected_loss(model, row, rates_for(chances, T), UNSMOOTHED)

    capped = {k: chances[k] for k in range(1, most)}
    capped[most] = sum(chances[k] for k in range(most, T + 1))
    wanted = sum(chance * mean_entropy(model, ordinary, k) for k, chance in capped.items())
    assert inside == pytest.approx(wanted, rel=1e-6)
    surplus = mean_entropy(model, ordinary, 1) / (2 * T)
    surplus += (T - most - 0.5) * mean_entropy(model, ordinary, most) / T
    assert inside == pytest.approx(bound(model, ordinary) + surplus, rel=1e-6)
    # The last position weighs 1/p like the others of its row: T/k, divided by T.
    wanted = sum(chance / k * mean_last(model, ordinary, k) for k, chance in capped.items())
    assert after == pytest.approx(wanted, rel=1e-6)


def test_smoothing_lowers_the_expected_loss_by_its_known_factor():
    model, smoothing = Table(T), 0.1
    chances = published_chances(T)
    inside, _ = expected_loss(
        model, NO_SPECIAL, rates_for(chances, T), UniformCorruption(smoothing=smoothing)
    )
    wanted = sum(
        chance * mean_entropy(model, range(T), k) / (1 + smoothing * (1 - k / T) / (k / T))
        for k, chance in chances.items()
    )
    assert inside == pytest.approx(wanted, rel=1e-6)


@ROWS
def test_exact_is_unbiased_for_the_bound(row):
    """With rounding 1, as in validation_noise, u ~ U(0, 1) gives k = 1..M equal chances."""
    model, ordinary = Table(T), ordinary_positions(row)
    most = len(ordinary)
    rates = {(k - 0.5) / most: 1 / most for k in range(1, most + 1)}
    inside, after = expected_loss(model, row, rates, UNIFORM, rounding=1.0, exact=True)
    assert inside == pytest.approx(bound(model, ordinary), rel=1e-6)
    # The token after the inputs counts once, averaged over the masks.
    wanted = sum(mean_last(model, ordinary, k) for k in range(1, most + 1)) / most / T
    assert after == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("target", ["next", "in_place"])
def test_exact_loss_of_a_perfect_model_is_the_negative_log_likelihood(target):
    """Tokens recovered in any order have the same likelihood, which is the bound's tight case."""
    model, row = TrueConditionals(T), (1, 8, 9, 10, 11, 12)
    ordinary = ordinary_positions(row)
    rates = {(k - 0.5) / 4: 1 / 4 for k in range(1, 5)}
    inside, _ = expected_loss(model, row, rates, UNIFORM, rounding=1.0, target=target, exact=True)
    likelihood = model.log_likelihood([]) - model.log_likelihood(ordinary)
    assert inside == pytest.approx(-likelihood / T, rel=1e-6)
