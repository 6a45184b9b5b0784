"""Log-likelihoods of continuations under a model, in the five modes of a dual model.

``Scorer`` is what tasks, the lm-evaluation-harness adapter and in-training evaluation use:

ar      Σ log p(c_i | all before it), causal: the autoregressive model.
prefix  the same, but the context sees itself bidirectionally; the continuation is causal over it.
pll     Σ log p(c_i | everything else), c_i masked: the pseudo-log-likelihood.
chain   Σ log p(c_i | all before it), c_i and all after it masked.
elbo    a bound of the log-likelihood from random masks (``masks`` has the formulas).

In the first two, what requests have in common is computed once (``tree``); in the others every row
is another input (``masks``). A score depends on its request only: neither on what else is scored,
nor on sizes of batches or numbers of ranks, up to the rounding of float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dualtrain.common.errors import UserError
from dualtrain.evaluate.masks import MaskedDocument, Masking, pack_documents
from dualtrain.evaluate.packing import Row, RowBatch, make_batches
from dualtrain.evaluate.request import (
    MASKING_MODES,
    MODES,
    Mode,
    Passage,
    Request,
    Score,
    check_scorable,
    encode_pair,
    fit_requests,
)
from dualtrain.evaluate.tree import make_trees
from dualtrain.model.handle import ModelHandle
from dualtrain.model.memory import choose_tokens, is_out_of_memory

__all__ = [
    "MASKING_MODES",
    "MODES",
    "Mode",
    "Request",
    "Score",
    "Scorer",
    "encode_pair",
]

# Masked rows are planned for so many batches of each rank at a time, not all at once: they take
# more memory than the requests do, by the length of the continuations.
_BATCHES_AT_ONCE = 64
# What a batch costs by itself, in tokens: starting kernels.
_OVERHEAD_TOKENS = {"cpu": 128, "cuda": 4096}
# Rows that attention by documents (varlen) is given; kernels are started for T positions of each
# document, however short it is, so longer ones cost.
_VARLEN_ROW_TOKENS = 512


class Scorer:
    """Scores requests.

    Args:
        tokens_per_batch: Tokens of a forward pass, padding included; None chooses by memory.
            Where memory runs out, it is halved.
        elbo_samples: Masks for each request in the mode ``elbo``.
        on_note: Told what the user should know.
    """

    def __init__(
        self,
        model: ModelHandle,
        *,
        tokens_per_batch: int | None = None,
        elbo_samples: int = 32,
        seed: int = 0,
        on_note: Callable[[str], None] = lambda note: None,
    ) -> None:
        self.model = model
        # FlexAttention is compiled for every shape, and there are too many of them here.
        self.backend = "sdpa" if model.backend == "flex" else model.backend
        self.tokens_per_batch = tokens_per_batch or choose_tokens(model)
        self.elbo_samples, self.seed, self.on_note = elbo_samples, seed, on_note
        varlen = self.backend == "varlen" and model.dtype != torch.float32
        # With a dense mask packed rows are no faster, and documents of one length need no mask.
        self.row_tokens = _VARLEN_ROW_TOKENS if varlen else 1

    def longest(self, mode: Mode) -> int:
        """Return how many tokens context and continuation may have together."""
        # The last token of a continuation is no input where nothing is predicted from it.
        return self.model.context + (mode not in MASKING_MODES)

    def score(
        self,
        requests: Sequence[Request],
        mode: Mode,
        *,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Score]:
        """Score requests; all ranks call with all of them, and all get all scores.

        Args:
            requests: Any number, in any order; equal ones are scored once. Of a context that is
                too long the oldest tokens behind ``<s>`` are dropped.
            mode: One of :data:`MODES`.
            on_progress: Told after each batch, on all ranks, how many of the requests are done so
                far, by the share of the work that is done. May raise to end it.

        Returns:
            The scores, in the order of the requests.

        Raises:
            UserError: A continuation that does not fit the model's context, or has nothing that
                may be masked; a mode that masks, of a model without a mask token; a single row
                for which there is not enough memory.
            ValueError: An unknown mode; a request without a context or without a continuation.
        """
        check_scorable(mode, requests, self.model.vocabulary)
        fitted = fit_requests(requests, self.longest(mode))
        passages = list(dict.fromkeys(passage for passage, _ in fitted))

        def report(passages_done: float) -> None:
            if on_progress:
                on_progress(int(passages_done / len(passages) * len(requests)))

        with self.model.inference():
            scores = self._score_all(passages, mode, report)
        return [Score(*scores[passage], dropped) for passage, dropped in fitted]

    def _score_all(
        self, passages: Sequence[Passage], mode: Mode, report: Callable[[float], None]
    ) -> dict[Passage, _Result]:
        """Score different passages, plan by plan, again with smaller batches where need be."""
        # Plans depend on it, and all ranks must have the same.
        self.tokens_per_batch = self._least(self.tokens_per_batch)
        waiting = list(passages)
        if mode in MASKING_MODES:
            # Those of one length together.
            waiting.sort(key=lambda passage: (-len(passage.tokens), passage.tokens))
        results: dict[Passage, _Result] = {}
        while waiting:
            plan = self._plan(waiting, mode)
            results.update(self._run(plan, len(results), report))
            count = len(plan.passages)
            waiting = [p for p in waiting[:count] if p not in results] + waiting[count:]
        return results

    def _plan(self, waiting: Sequence[Passage], mode: Mode) -> _Plan:
        """Plan the rows of the first of the passages: of all, in the modes that do not mask."""
        if mode not in MASKING_MODES:
            rows, reads = make_trees(
                waiting, bidirectional=mode == "prefix", limit=self.tokens_per_batch
            )
            return _Plan(waiting, rows, reads, None)
        masking = Masking(
            mode, self.model.vocabulary, self.model.target, self.elbo_samples, self.seed
        )
        most = _BATCHES_AT_ONCE * self.model.world_size * self.tokens_per_batch
        documents: list[MaskedDocument] = []
        reads: list[np.ndarray] = []
        weights: list[np.ndarray] = []
        read_count = tokens = 0
        for passage in waiting:
            copies, factors = masking.documents(passage)
            documents += copies
            reads.append(np.arange(read_count, read_count + len(factors)))
            weights.append(factors)
            read_count += len(factors)
            tokens += len(copies) * len(passage.tokens)
            if tokens >= most:
                break
        rows = pack_documents(documents, min(self.row_tokens, self.tokens_per_batch))
        return _Plan(waiting[: len(reads)], rows, reads, weights)

    def _run(
        self, plan: _Plan, before: int, report: Callable[[float], None]
    ) -> dict[Passage, _Result]:
        """Run a plan, to its end or until memory runs out; return what is complete."""
        overhead = _OVERHEAD_TOKENS.get(self.model.device.type, _OVERHEAD_TOKENS["cuda"])
        batches = make_batches(plan.rows, self.tokens_per_batch, overhead_tokens=overhead)
        total, done = sum(batch.tokens for batch in batches), 0
        outputs = []
        world_size = self.model.world_size
        for begin in range(0, len(batches), world_size):
            number = begin + self.model.rank
            # A rank without a batch left runs the first one again, for the others' sake: under
            # ZeRO-3 a forward pass takes all ranks.
            batch = batches[number if number < len(batches) else 0]
            output = self._attempt(batch)
            if self._shrinks(batch, failed=output is None):
                break
            if number < len(batches):
                outputs.append((batch.reads, output))
            done += sum(batch.tokens for batch in batches[begin : begin + world_size])
            report(before + len(plan.passages) * done / total)
        return plan.results(self._exchange(plan.read_count, outputs))

    def _attempt(self, batch: RowBatch) -> tuple[Tensor, Tensor] | None:
        """Run a batch: (N,) losses and whether each target is the likeliest; None without memory.

        The tensors stay on the device, so that nothing waits for it.
        """
        try:
            plan = batch.plan(self.backend, self.model.device, self.model.dtype)
            ids, options = batch.inputs(self.model.device)
            output = self.model(ids, attention=plan, **options)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            assert output.nll is not None and output.is_top is not None
            return output.nll, output.is_top
        # Not before the error is gone, which holds what the pass had allocated.
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _shrinks(self, batch: RowBatch, *, failed: bool) -> bool:
        """Make batches smaller if one failed on any rank, and say whether that was so.

        Raises:
            UserError: It cannot be divided.
        """
        enough = self.tokens_per_batch
        smaller = enough
        if failed:
            smaller = min(enough, batch.tokens) // 2 if batch.parts > 1 else 0
        smaller = self._least(smaller)
        if smaller == enough:
            return False
        if smaller == 0:
            raise UserError(
                "memory",
                f"ran out in a row of {batch.width} tokens by itself",
                hint="free some of it, or use another device, or a lower precision",
            )
        self.tokens_per_batch = smaller
        self.on_note(f"memory ran out: batches of {smaller:,} tokens from here on, not {enough:,}")
        return True

    def _least(self, number: int) -> int:
        """Return the smallest of the ranks' numbers."""
        if self.model.world_size == 1:
            return number
        shared = torch.tensor(number, device=self.model.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MIN)
        return int(shared)

    def _exchange(
        self, read_count: int, outputs: Sequence[tuple[np.ndarray, tuple[Tensor, Tensor]]]
    ) -> np.ndarray:
        """Bring together what all ranks have read.

        Returns:
            (3, N) float64: losses, whether the target is the likeliest, and whether it was read.
        """
        found = np.zeros((3, read_count))
        for reads, (losses, is_top) in outputs:
            found[0, reads] = losses.cpu().double().numpy()
            found[1, reads] = is_top.cpu().numpy()
            found[2, reads] = 1
        if self.model.world_size > 1:
            # One rank's number and zeros: the sum is exact, whatever the order of the additions.
            shared = torch.from_numpy(found).to(self.model.device)
            dist.all_reduce(shared)
            found = shared.cpu().numpy()
        return found


_Result = tuple[float, bool | None]
"""Log-likelihood, and whether the continuation is greedy where that is asked."""


@dataclass(frozen=True)
class _Plan:
    """Rows, and how scores come from what is read there."""

    passages: Sequence[Passage]
    rows: Sequence[Row]
    reads: Sequence[np.ndarray]  # for each passage the numbers of its readings
    weights: Sequence[np.ndarray] | None  # of their losses; None in modes that do not mask: all 1

    @property
    def read_count(self) -> int:
        return sum(len(row.reads) for row in self.rows)

    def results(self, found: np.ndarray) -> dict[Passage, _Result]:
        """Add up the losses, from ``Scorer._exchange``, of passages that are read to the end."""
        losses, is_top, is_read = found[0], found[1] > 0, found[2] > 0
        results: dict[Passage, _Result] = {}
        for number, (passage, reads) in enumerate(zip(self.passages, self.reads, strict=True)):
            if not is_read[reads].all():
                continue
            if self.weights is None:
                results[passage] = -float(losses[reads].sum()), bool(is_top[reads].all())
            else:
                results[passage] = -float(losses[reads] @ self.weights[number]), None
        return results
