"""Log-likelihoods of continuations under a model, in the five modes of a dual model.

``Scorer`` is what tasks, the lm-evaluation-harness adapter and in-training evaluation use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import torch

from dualtrain.errors import UserError
from dualtrain.evaluate.mode import inference
from dualtrain.model import DualOutput, plan_attention, to_device

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from dualtrain.trained import TrainedModel

Mode = Literal["ar", "prefix", "pll", "chain", "elbo"]
MODES: tuple[Mode, ...] = get_args(Mode)
MASKING_MODES: tuple[Mode, ...] = ("pll", "chain", "elbo")
"""Those that need a mask token."""


@dataclass(frozen=True, slots=True)
class Request:
    """A continuation to be scored after a context.

    Attributes:
        context: Token ids, the first of them ``<s>``.
        continuation: Token ids, at least one.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """What a request got.

    Attributes:
        log_likelihood: In nats, summed over the continuation, in the mode's sense.
        is_greedy: Whether every token is the likeliest one; None in the modes that mask.
        dropped: The oldest tokens of the context behind ``<s>`` that the model had no room for.
    """

    log_likelihood: float
    is_greedy: bool | None
    dropped: int


class ScorerVocab(Protocol):
    """What is asked of ``trained.Vocab`` or ``DatasetInfo``."""

    @property
    def mask_id(self) -> int | None: ...

    @property
    def special_ids(self) -> tuple[int, ...]: ...


class Scorer:
    """Scores requests.

    Args:
        forward: A ``DualLM``, a ``TrainedModel`` or a DeepSpeed engine.
        vocab: Its mask token and special tokens.
        context: The longest row in tokens.
        target: What the diffusion objective was trained to predict at i: token i+1, or i.
        device: Where the model is.
        backend: Attention backend.
        dtype: Compute type of the attention.
        tokens_per_batch: Tokens of a forward pass, padding included; None chooses.
        elbo_samples: Masks for each request in the mode ``elbo``.
        seed: Of these masks.
        rank: This process.
        world_size: All processes; they call :meth:`score` together.
        on_note: Told what the user should know.
    """

    def __init__(
        self,
        forward: Callable[..., DualOutput],
        *,
        vocab: ScorerVocab,
        context: int,
        target: Literal["next", "in_place"] = "next",
        device: torch.device | str = "cpu",
        backend: str = "sdpa",
        dtype: torch.dtype = torch.float32,
        tokens_per_batch: int | None = None,
        elbo_samples: int = 32,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        on_note: Callable[[str], None] | None = None,
    ) -> None:
        self.forward, self.vocab, self.context, self.target = forward, vocab, context, target
        self.device, self.backend, self.dtype = torch.device(device), backend, dtype
        self.tokens_per_batch = tokens_per_batch or 4096
        self.elbo_samples, self.seed = elbo_samples, seed
        self.rank, self.world_size = rank, world_size
        self.on_note = on_note or (lambda note: None)

    @classmethod
    def of(cls, trained: TrainedModel, **options) -> Scorer:
        """Make a scorer of a model that was opened; options as of the class."""
        settings = {
            "vocab": trained.vocab,
            "context": trained.context,
            "target": trained.target,
            "device": trained.device,
            "backend": trained.backend,
            "dtype": trained.dtype,
        }
        return cls(trained, **(settings | options))

    def longest(self, mode: Mode) -> int:
        """Return how many tokens context and continuation may have together.

        The last token of a continuation is no input where nothing after it is predicted.
        """
        return self.context + (mode not in MASKING_MODES)

    def score(
        self,
        requests: Sequence[Request],
        mode: Mode,
        *,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Score]:
        """Score requests; all ranks call with all of them, and all get all scores.

        Args:
            requests: Any number, in any order; equal ones are scored once.
            mode: One of :data:`MODES`.
            on_progress: Told from time to time how many of the requests are done so far.

        Returns:
            The scores, in the order of the requests.

        Raises:
            UserError: A continuation that does not fit the model's context; a mode that masks, of
                a model without a mask token.
        """
        if mode != "ar":
            raise UserError("mode", f"{mode!r} is not available yet", "ar")
        done: dict[Request, Score] = {}
        unique = sorted(set(requests), key=lambda r: -len(r.context) - len(r.continuation))
        with inference(getattr(self.forward, "model", self.forward)):
            while len(done) < len(unique):
                width = len(unique[len(done)].context) + len(unique[len(done)].continuation) - 1
                count = max(1, self.tokens_per_batch // min(width, self.context))
                batch = unique[len(done) : len(done) + count]
                done.update(zip(batch, self._score_causal(batch), strict=True))
                if on_progress:
                    on_progress(len(done))
        return [done[request] for request in requests]

    def _score_causal(self, requests: Sequence[Request]) -> list[Score]:
        rows, dropped = [], []
        for request in requests:
            room = self.longest("ar") - len(request.continuation)
            if room < 1:
                raise UserError(
                    "continuation",
                    f"of {len(request.continuation)} tokens",
                    f"at most {self.longest('ar') - 1}",
                )
            excess = max(0, len(request.context) - room)
            context = request.context[:1] + request.context[1 + excess :]
            rows.append(context + request.continuation)
            dropped.append(excess)
        width = max(map(len, rows)) - 1
        ids = torch.tensor([row[:-1] + (0,) * (width + 1 - len(row)) for row in rows])
        plan = plan_attention(
            "causal",
            torch.zeros(ids.shape, dtype=torch.int32),
            backend="sdpa",
            device=self.device,
            dtype=self.dtype,
        )
        reads = [
            (number * width + position, row[position + 1])
            for number, (row, request) in enumerate(zip(rows, requests, strict=True))
            for position in range(len(row) - len(request.continuation) - 1, len(row) - 1)
        ]
        selection, targets = torch.tensor(reads).T
        output = self.forward(
            to_device(ids, self.device),
            attention=plan,
            selection=to_device(selection.contiguous(), self.device),
            targets=to_device(targets.contiguous(), self.device),
        )
        assert output.nll is not None and output.is_top is not None
        counts = [len(request.continuation) for request in requests]
        losses = output.nll.cpu().double().split(counts)
        tops = output.is_top.cpu().split(counts)
        return [
            Score(-float(loss.sum()), bool(top.all()), excess)
            for loss, top, excess in zip(losses, tops, dropped, strict=True)
        ]


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str, *, bos_id: int) -> Request:
    """Encode a context and its continuation together, and divide the ids between them.

    Args:
        tokenizer: Takes text literally.
        context: May be empty: then the context of the request is ``<s>`` alone.
        continuation: With its leading space, if it has one.
        bos_id: ``<s>``.

    Returns:
        The request. A token that holds the end of the context and the beginning of the
        continuation belongs to the continuation.
    """
    encoding = tokenizer.encode(context + continuation, add_special_tokens=False)
    split = sum(stop <= len(context) for _, stop in encoding.offsets)
    return Request((bos_id, *encoding.ids[:split]), tuple(encoding.ids[split:]))
