"""Tests of: dualtrain.algorithms.dual_objective, input_masking.

The algorithms of every run, at their moments, through the dispatcher.
"""

import math
from fractions import Fraction

import pytest
import torch

from dualtrain.algorithms.events import Dispatcher, Event, State
from dualtrain.algorithms.registry import REGISTRY, build_algorithms
from dualtrain.common.vocabulary import Vocabulary
from dualtrain.data.batches import Batch
from dualtrain.method.mixing import STREAM_NUMBERS, Mixture, Slot, alpha_at
from dualtrain.method.objectives import (
    autoregressive,
    diffusion,
    masking_noise,
    with_scheduled_rate,
)
from dualtrain.recipe.load import load_recipe
from dualtrain.recipe.schema import RateSchedule, Recipe
from dualtrain.training.train import begin_step

SPECIAL, MASK, SIZE, LENGTH = (0, 1, 2, 3, 4), 4, 60, 24
IDS = Vocabulary(size=SIZE, special_ids=SPECIAL, bos_id=1, eos_id=2, mask=MASK)


class Log:
    def __init__(self):
        self.values = {}

    def log(self, name, value):
        self.values[name] = float(value)


def make_recipe(**changes):
    basis = {"name": "test", "alpha": "1/2", "steps": 8, "seed": 5, "data": {"path": "d"}}
    return Recipe.model_validate(basis | changes)


def make_batch(stream, first=0, count=4, length=LENGTH):
    """Sequences first, first + 1, ... of a stream: the same whoever asks for them."""
    rows = [
        torch.randint(
            5, SIZE, (length + 1,), generator=torch.Generator().manual_seed(100 * number + 7)
        )
        for number in range(first, first + count)
    ]
    tokens = torch.stack(rows)
    inputs, targets = tokens[:, :-1].clone(), tokens[:, 1:].clone()
    # Documents of nine tokens, the last one cut: `<s>` and eight inputs, then `</s>`.
    inputs[:, ::9] = 1
    targets[:, 8::9] = 2
    documents = (torch.arange(length) // 9).int().expand(count, length)
    numbers = torch.arange(first, first + count)
    return Batch(
        inputs, targets, documents, numbers, stream, (tuple(range(-(-length // 9))),) * count
    )


def make_state(recipe, slots=4):
    mixture = Mixture(
        alpha=lambda step: alpha_at(recipe.alpha, step, recipe.steps),
        steps=recipe.steps,
        slots=slots,
        micro_batch=4,
        mixing=recipe.objective.mixing,
        rotation=False,
    )
    return State(
        recipe=recipe,
        steps=recipe.steps,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        vocabulary=IDS,
        mixture=mixture,
        model=None,
    )


def dispatcher(recipe, log=None):
    return Dispatcher(build_algorithms(recipe), logger=log or Log())


def example_for(recipe, slot, batch, log=None, step=0):
    """The example that a slot's batch becomes, before the model sees it."""
    state = make_state(recipe)
    state.step = step
    state.slot, state.batch = slot, batch
    run = dispatcher(recipe, log)
    for event in (Event.BATCH_START, Event.BEFORE_FORWARD):
        run.dispatch(event, state)
    return state.example


def slot(objective, stream=None, first=0):
    return Slot(0, objective, stream or objective, first, 1.0)


def same(one, other):
    tensors = ("input_ids", "targets", "weights", "document_ids")
    return one.attention == other.attention and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in tensors
    )


def test_learning_rate_and_alpha_of_every_step():
    curriculum = {"name": "linear", "phases": [{"until": 1, "alpha": 0}]}
    recipe = make_recipe(alpha=curriculum, optim={"lr": 0.5, "schedule": {"warmup_steps": 2}})
    state, seen = make_state(recipe), []
    for state.step in range(8):
        begin_step(state)
        seen.append((state.learning_rate, state.alpha))
    assert [rate for rate, _ in seen] == [0.25, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.25]
    assert [alpha for _, alpha in seen] == [float(1 - Fraction(n, 8)) for n in range(8)]


def test_ar_slots_get_clean_inputs_and_causal_attention():
    recipe, batch = make_recipe(objective={"ar_weight": 2.0}), make_batch("ar")
    example = example_for(recipe, slot("ar"), batch)
    wanted = autoregressive(batch, IDS, ar_weight=2.0)
    assert same(example, wanted)
    assert example.attention == "causal"


@pytest.mark.parametrize("corruption", ["uniform", "span"])
@pytest.mark.parametrize("target", ["next", "in_place"])
def test_diffusion_slots_are_corrupted_as_the_recipe_says(corruption, target):
    recipe = make_recipe(objective={"target": target, "corruption": {"name": corruption}})
    batch = make_batch("diffusion", first=12)
    noise = masking_noise(5, "corruption", 1, range(12, 16), LENGTH, spans=True)
    if corruption == "span":
        noise = with_scheduled_rate(noise, RateSchedule(start=0.3, end=0.15), 0, 8)
    wanted = diffusion(batch, IDS, noise, recipe.objective.corruption, target=target)
    example = example_for(recipe, slot("diffusion", first=12), batch)
    assert same(example, wanted) and example.attention == "full"
    assert not torch.equal(example.input_ids, batch.inputs)


def chosen_by_gpt_bert(tokens, noise, row, rate, max_span):
    """Positions of a row that GPT-BERT's recipe chooses at a rate, in plain Python."""
    length = len(tokens)
    order, lengths = noise.order[row].tolist(), noise.spans[0, row].tolist()
    ratios = []
    for number, chance in enumerate(lengths):
        ratios += [order[number]] * (1 + int(max_span * chance))
    ratios = [
        ratios[i] if token not in SPECIAL else math.inf for i, token in enumerate(tokens.tolist())
    ]
    count = max(1, int(length * rate + noise.rounding[row].item()))
    threshold = sorted(ratios)[count - 1]
    return {i for i in range(length) if ratios[i] <= threshold}


@pytest.mark.parametrize(
    ("corruption", "start", "end", "max_span"),
    [
        (load_recipe("ablations/span-masking").recipe.objective.corruption, 0.3, 0.15, 3),
        ({"name": "span", "rate": {"start": 0.1, "end": 0.5}, "max_span": 5}, 0.1, 0.5, 5),
        ({"name": "uniform", "rate": {}}, 0.3, 0.15, 1),
        ({"name": "uniform", "rate": {"start": 0.4}}, 0.4, 0.15, 1),
    ],
)
def test_all_rows_of_a_step_have_the_rate_that_gpt_bert_has_there(corruption, start, end, max_span):
    steps, count, length = 9, 16, 200
    objective = {"target": "in_place", "corruption": corruption}
    recipe = make_recipe(objective=objective, steps=steps)
    batch = make_batch("diffusion", first=12, count=count, length=length)
    noise = masking_noise(5, "corruption", 1, range(12, 12 + count), length, spans=True)
    shares = []
    for step in range(steps):
        example = example_for(recipe, slot("diffusion", first=12), batch, step=step)
        # In place, what is scored is what was chosen, whatever became of it.
        chosen = example.weights > 0
        rate = start + (end - start) * step / steps
        for row, scored in enumerate(chosen):
            expected = chosen_by_gpt_bert(batch.inputs[row], noise, row, rate, max_span)
            assert set(scored.nonzero().flatten().tolist()) == expected
            # The loss is a mean over them; the uniform corruption's is smoothed a little.
            assert example.weights[row].sum().item() == pytest.approx(length, rel=2e-3)
        counts = chosen.sum(dim=1)
        # Rounding makes a difference of 1, and a last span is finished.
        assert counts.max() - counts.min() <= max_span
        shares.append(counts.double().mean().item() / length)
    overshoot = (max_span - 1) / length
    for step in (0, steps // 2, steps - 1):
        rate = start + (end - start) * step / steps
        assert rate - 0.005 < shares[step] < rate + overshoot + 0.005


def test_masks_are_the_same_on_any_number_of_ranks_and_shared_by_none():
    recipe = make_recipe(alpha=0)
    mixture = make_state(recipe, slots=8).mixture
    by_world = {}
    for world in (1, 2, 8):
        inputs = {}
        for rank in range(world):
            for mine in mixture.for_rank(3, rank, world):
                batch = make_batch("diffusion", mine.first_sequence)
                example = example_for(recipe, mine, batch)
                for number, row in zip(batch.sequence_ids.tolist(), example.input_ids, strict=True):
                    inputs[number] = tuple(row.tolist())
        by_world[world] = inputs
    assert by_world[1] == by_world[2] == by_world[8] and len(by_world[1]) == 32
    masks = [tuple(token == MASK for token in row) for row in by_world[1].values()]
    # Few tokens masked, or all of them, may coincide by chance.
    middling = [mask for mask in masks if 3 < sum(mask) < 18]
    assert len(middling) > 10 and len(set(middling)) == len(middling)


def test_seed_and_stream_change_the_masks():
    batch, other = make_batch("diffusion"), make_batch("all")
    assert torch.equal(batch.inputs, other.inputs)
    examples = [
        example_for(make_recipe(), slot("diffusion"), batch),
        example_for(make_recipe(seed=6), slot("diffusion"), batch),
        example_for(make_recipe(), slot("diffusion", "all"), other),
    ]
    assert len({tuple(each.input_ids.flatten().tolist()) for each in examples}) == 3


def test_stream_numbers_are_part_of_every_run_that_is_to_be_resumed():
    assert STREAM_NUMBERS == {"ar": 0, "diffusion": 1, "all": 2}


def test_input_masking_hides_inputs_of_ar_slots_only():
    recipe = make_recipe(
        algorithms=[{"use": "input_masking", "args": {"share": 1.0, "max_rate": 0.5}}]
    )
    log, batch = Log(), make_batch("ar", count=64)
    example = example_for(recipe, slot("ar"), batch, log)
    clean = autoregressive(batch, IDS)
    masked = example.input_ids != clean.input_ids
    assert (example.input_ids[masked] == MASK).all()
    assert not masked[clean.input_ids < 5].any()
    # Rates are uniform on [0, 1/2]: a quarter of the 21 ordinary tokens in 24, on average.
    rates = masked.float().mean(dim=1)
    assert rates.mean().item() == pytest.approx(0.25 * 21 / 24, abs=0.05)
    assert rates.min() < 0.1 and rates.max() > 0.3
    assert log.values["input_masking/rate"] == pytest.approx(masked.float().mean().item())
    # Everything but the inputs stays.
    example.input_ids = clean.input_ids
    assert same(example, clean)

    plain = make_recipe()
    assert same(
        example_for(recipe, slot("diffusion"), make_batch("diffusion")),
        example_for(plain, slot("diffusion"), make_batch("diffusion")),
    )


def test_input_masking_takes_its_share_of_sequences_whoever_runs_them():
    recipe = make_recipe(
        algorithms=[{"use": "input_masking", "args": {"share": 0.25, "max_rate": 1.0}}]
    )
    whole = example_for(recipe, slot("ar"), make_batch("ar", count=400)).input_ids
    touched = (whole != make_batch("ar", count=400).inputs).any(dim=1)
    # 400 draws: a standard deviation of 0.022; a rate near 0 leaves some chosen ones untouched.
    assert 0.15 < touched.float().mean() < 0.33
    part = example_for(recipe, slot("ar", first=40), make_batch("ar", first=40, count=4)).input_ids
    assert torch.equal(part, whole[40:44])


@pytest.mark.parametrize("corruption", ["uniform", "span"])
def test_every_registered_algorithm_resumes_exactly(corruption):
    """Twice four steps with a new process between them, against eight steps in one go."""
    recipe = make_recipe(
        objective={"corruption": {"name": corruption}},
        alpha={"name": "linear", "phases": [{"until": 1, "alpha": "1/4"}]},
        algorithms=[{"use": name} for name in REGISTRY],
    )

    def train(run, first, last):
        state, seen = make_state(recipe), []
        for state.step in range(first, last):
            begin_step(state)
            run.dispatch(Event.STEP_START, state)
            seen.append((state.learning_rate, state.alpha))
            for current in state.mixture.slots(state.step):
                state.slot = current
                state.batch = make_batch(current.stream, current.first_sequence)
                for event in (Event.BATCH_START, Event.BEFORE_FORWARD):
                    run.dispatch(event, state)
                seen.append((state.example.input_ids.tolist(), state.example.weights.tolist()))
            run.dispatch(Event.STEP_END, state)
        return seen

    straight = train(dispatcher(recipe), 0, 8)
    stopped = dispatcher(recipe)
    first_half = train(stopped, 0, 4)
    resumed = dispatcher(recipe)
    resumed.load_state_dict(stopped.state_dict())
    assert first_half + train(resumed, 4, 8) == straight
    assert list(stopped.state_dict()) == [
        "DualObjective",
        *(kind.__name__ for kind in REGISTRY.values()),
    ]
