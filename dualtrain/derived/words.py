"""Checkpoints at words seen, as the BabyLM challenge asks for them."""

from __future__ import annotations

from dualtrain.common.errors import UserError
from dualtrain.data.corpus import CorpusFacts
from dualtrain.recipe.schema import Recipe

MILLION = 10**6
_SMALL = (*range(1, 11), *range(20, 101, 10))
_NAMED = {"strict-small": _SMALL, "strict": (*_SMALL, *range(200, 1001, 100))}
"""The challenge's milestones by track, in millions of words."""
_NEAR = 1.01
"""A milestone so near behind the run's end is its end: a held-out part is not trained on."""


def word_milestones(
    recipe: Recipe, steps: int, corpus: CorpusFacts | None
) -> dict[int, tuple[int, ...]]:
    """Find the steps at which ``checkpoint.at.words`` are seen.

    A step sees as many words as its tokens have on average over the train split.

    Args:
        steps: Of the run.
        corpus: None if there is no dataset yet; then there are none.

    Returns:
        By step, the words of the milestones that it is nearest to.

    Raises:
        UserError: The dataset's words are not known, or a milestone is beyond the run.
    """
    at = recipe.checkpoint.at
    if at is None or corpus is None:
        return {}
    if corpus.words is None:
        raise UserError(
            "checkpoint.at.words",
            f"the dataset {recipe.data.path} does not say how many words it has",
            "a dataset whose words were counted",
            "make it again with `dualtrain data convert`, from all texts at once if it was merged",
        )
    wanted = at.words
    words = [n * MILLION for n in _NAMED[wanted]] if isinstance(wanted, str) else wanted
    tokens = corpus.packed_tokens(append_eos=recipe.data.append_eos)
    per_step = recipe.global_batch * recipe.sequence_length * corpus.words / tokens
    end = steps * per_step
    if beyond := [number for number in words if number > end * _NEAR]:
        raise UserError(
            "checkpoint.at.words",
            f"{beyond[0]:,} words are beyond the run, which sees {end:,.0f}",
            "words that it sees",
            "leave them out, or train longer",
        )
    found: dict[int, tuple[int, ...]] = {}
    for number in sorted(words):
        step = min(steps, max(1, round(number / per_step)))
        found[step] = (*found.get(step, ()), number)
    return found
