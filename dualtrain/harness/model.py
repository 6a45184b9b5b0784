"""lm-evaluation-harness on our models: the model type ``dualtrain`` for its registry and command.

``python -m dualtrain.harness.model run --model dualtrain --model_args path=RUN,mode=prefix …``
is the harness's own command, which then knows ours. Version 0.4.13 finds nothing of other packages
by itself; later ones look for the entry point that this package has. Needs ``dualtrain[eval]``.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.distributed as dist
from tqdm import tqdm

from dualtrain.checkpoint.trained import Precision, open_trained
from dualtrain.common.errors import EXIT_DONE, EXIT_USER_ERROR, UserError, nearest
from dualtrain.evaluate.request import MOST_ELBO_SAMPLES
from dualtrain.evaluate.scoring import (
    MASKING_MODES,
    MODES,
    Mode,
    Request,
    Score,
    Scorer,
    encode_pair,
)
from dualtrain.launch.world import launched_ranks

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    if str(error.name).split(".")[0] != "lm_eval":
        raise
    raise UserError(
        "dualtrain.harness.model",
        "lm-evaluation-harness is not installed",
        hint="pip install 'dualtrain[eval]'",
    ) from None

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

logger = logging.getLogger("lm_eval.models.dualtrain")
"""Below the harness's logger, whose settings it follows."""

DEFAULT_DEVICE = "cuda:0"

WRITES_ONLY = "diffusion"
"""The mode that fills masks behind a prompt, and scores nothing."""


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """``--model_args`` of the model type ``dualtrain``; harness/README.md says what they do."""

    path: str | None = None
    mode: Mode | Literal["diffusion"] = "ar"
    step: int | None = None
    device: str | None = None
    precision: str | None = None
    tokens_per_batch: int | None = None
    elbo_samples: int = 32
    seed: int = 0
    max_gen_toks: int = 256
    steps: int | None = None
    block: int | None = None

    def check(self) -> None:
        """Refuse what no model has.

        Raises:
            UserError: A value that an option cannot have.
        """
        if self.path is None:
            raise _wrong("path", "not given", "a run, a checkpoint, or an exported model")
        for key, words in (("mode", (*MODES, WRITES_ONLY)), ("precision", get_args(Precision))):
            value = getattr(self, key)
            if value not in words and (key, value) != ("precision", None):
                raise _wrong(key, f"{value!r}", f"one of {', '.join(words)}", value, words)
        for key, least in _LEAST.items():
            value = getattr(self, key)
            if value is None and getattr(ModelArguments, key) is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise _wrong(key, f"{value!r}", f"a whole number, at least {least}")
        if self.elbo_samples > MOST_ELBO_SAMPLES:
            raise _wrong("elbo_samples", f"{self.elbo_samples}", f"at most {MOST_ELBO_SAMPLES}")
        for key in ("steps", "block"):
            if getattr(self, key) is not None and self.mode != WRITES_ONLY:
                raise _wrong(key, f"has no say in mode {self.mode}", f"mode={WRITES_ONLY}")


_LEAST = {"step": 0, "seed": 0} | dict.fromkeys(
    ("tokens_per_batch", "elbo_samples", "max_gen_toks", "steps", "block"), 1
)


@register_model("dualtrain")
class DualtrainLM(TemplateLM):
    """A run, a checkpoint or an exported model, scored in one of the five modes, or writing.

    Args:
        batch_size: The harness always gives one; rows are batched by tokens instead.
        given: The fields of :class:`ModelArguments`.

    Raises:
        UserError: No model at ``path``, an option that does not exist, or a value it cannot have.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **given: Any,
    ) -> None:
        super().__init__()
        known = [field.name for field in fields(ModelArguments)]
        for key in given:
            if key not in known:
                raise _wrong(key, "no such option", f"one of {', '.join(known)}", key, known)
        options = self.options = ModelArguments(path=path, **given)
        options.check()
        if batch_size not in (None, 1, "1") or max_batch_size is not None:
            logger.warning("dualtrain batches by tokens: use tokens_per_batch, not batch_size")
        self.mode: Mode | Literal["diffusion"] = options.mode
        self._rank, self._world_size = join_ranks()
        self.trained = open_trained(
            str(path),
            step=options.step,
            device=_own_device(options.device),
            precision=options.precision,
            on_note=logger.warning,
        )
        self._device = self.trained.device
        self.scorer = Scorer(
            self.trained,
            tokens_per_batch=options.tokens_per_batch,
            elbo_samples=options.elbo_samples,
            seed=options.seed,
            on_note=logger.warning,
        )

    @property
    def eot_token_id(self) -> int:
        return self.trained.vocabulary.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.trained.vocabulary.bos_id

    @property
    def max_length(self) -> int:
        return self.trained.context

    @property
    def tokenizer_name(self) -> str:
        """What tells this tokenizer from others in the harness's cache of requests."""
        content = self.trained.tokenizer.to_str().encode()
        return f"dualtrain-{hashlib.sha256(content).hexdigest()[:16]}"

    def get_model_info(self) -> dict[str, object]:
        """What the results say of the model."""
        return {
            "dualtrain_model": self.trained.source.name,
            "dualtrain_path": str(self.trained.source.path.resolve()),
            "dualtrain_mode": self.mode,
            "model_num_parameters": sum(p.numel() for p in self.trained.model.parameters()),
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: object
    ) -> list[int]:
        """Encode a text, with ``<s>`` if ``add_special_tokens`` says so."""
        ids = self.trained.encode(string)
        return [self.prefix_token_id, *ids] if add_special_tokens else ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode a pair as our own tasks do.

        As for every model of the harness, spaces at the end of a context are scored with the
        continuation.
        """
        kept = context.rstrip()
        request = encode_pair(
            self.trained.tokenizer,
            kept,
            context[len(kept) :] + continuation,
            bos_id=self.prefix_token_id,
        )
        return list(request.context), list(request.continuation)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Score continuations.

        Returns:
            For each request its log-likelihood in nats, in the mode's sense, and whether every
            token was the likeliest: in the modes that mask, where that is not known, always False.
        """
        if self.mode in MASKING_MODES:
            _warn_of_unknown_greediness(requests, self._scoring_mode)
        pairs: list[Any] = [instance.args for instance in requests]
        encoded = [(pair, *self._encode_pair(*pair)) for pair in pairs]
        answers = self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)
        for pair, answer in zip(pairs, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, answer)
        return answers

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: object,
    ) -> list[tuple[float, bool]]:
        scores = self._score(
            [Request(tuple(context), tuple(tokens)) for _, context, tokens in requests],
            disable_tqdm=disable_tqdm,
        )
        return [(score.log_likelihood, bool(score.is_greedy)) for score in scores]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Score whole texts, cut into windows that each see one token of the one before.

        Returns:
            For each text the log-likelihood in nats, given ``<s>``: exact in ``ar``, ``prefix``
            and ``chain``, a lower bound in ``elbo``.

        Raises:
            UserError: The mode is ``pll``, whose sum is no likelihood, and no perplexity follows.
        """
        if self.mode == "pll":
            raise _wrong("mode", "'pll' gives no likelihood of a text", "ar, prefix, chain or elbo")
        texts = [instance.args[0] for instance in requests]
        windows = [self._windows(text) for text in texts]
        scores = iter(self._score([w for of_text in windows for w in of_text], disable_tqdm))
        sums = [sum(next(scores).log_likelihood for _ in of_text) for of_text in windows]
        for text, total in zip(texts, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return sums

    def _windows(self, text: str) -> list[Request]:
        """Divide a text: each token is scored once, the last window has the longest context."""
        cut = get_rolling_token_windows(
            self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.scorer.longest(self._scoring_mode) - 1,
            context_len=1,
        )
        return [Request(tuple(a), tuple(b)) for a, b in map(make_disjoint_window, cut)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Write texts from left to right, or in ``diffusion`` by filling masks behind the prompt.

        In ``prefix``, the prompt sees itself both ways.

        Raises:
            UserError: Another mode, or a setting of the task that our sampler has not.
        """
        from dualtrain.generate.settings import Settings
        from dualtrain.harness.generation import write_texts

        if self.mode in MASKING_MODES:
            raise _wrong("mode", f"{self.mode!r} writes no texts", "ar, prefix or diffusion")
        asked: list[Any] = [instance.args for instance in requests]
        is_hidden = disable_tqdm or self.rank != 0
        with tqdm(total=len(asked), desc=f"Writing, {self.mode}", disable=is_hidden) as bar:

            def on_text(number: int, text: str) -> None:
                self.cache_hook.add_partial("generate_until", asked[number], text)
                bar.update()

            return write_texts(
                self.trained,
                asked,
                Settings(
                    mode=self.mode,
                    tokens=self.options.max_gen_toks,
                    seed=self.options.seed,
                    steps=self.options.steps,
                    block=self.options.block,
                ),
                tokens_per_batch=self.options.tokens_per_batch,
                on_text=on_text,
                on_note=logger.warning,
            )

    @property
    def _scoring_mode(self) -> Mode:
        if self.mode == "diffusion":
            raise _wrong("mode", f"{self.mode!r} writes, and scores nothing", ", ".join(MODES))
        return self.mode

    def _score(self, requests: Sequence[Request], disable_tqdm: bool) -> list[Score]:
        mode, is_hidden = self._scoring_mode, disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), desc=f"Scoring, {mode}", disable=is_hidden) as bar:

            def on_progress(done: int) -> None:
                bar.update(done - bar.n)

            scores = self.scorer.score(requests, mode, on_progress=on_progress)
            on_progress(len(requests))
        return scores

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Refuse: the models know no chats."""
        raise UserError("--apply_chat_template", "the model has no chat template", "no such option")

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.world_size == 1:
            return tensor
        parts = [torch.empty(0)] * self.world_size
        dist.all_gather_object(parts, tensor.cpu())
        return torch.stack(parts) if tensor.ndim == 0 else torch.cat(parts)

    def gather_object(self, obj: object, dst: int = 0) -> list | None:
        """Collect what all ranks have on one of them; the others get None."""
        parts: list | None = [None] * self.world_size if self.rank == dst else None
        if self.world_size == 1:
            return [obj]
        dist.gather_object(obj, parts, dst=dst)
        return parts

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def main() -> int:
    """Run the harness's own command, in which ``--model dualtrain`` is known.

    Returns:
        The exit code.
    """
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return EXIT_DONE


def join_ranks() -> tuple[int, int]:
    """Meet the other processes that a launcher has started, if there are any.

    The harness divides the items of a task between them.

    Returns:
        Rank and number of ranks.
    """
    if launched_ranks(os.environ) == 1:
        return 0, 1
    if not dist.is_initialized():
        # Ranks are not equally fast: the first to be done waits for the last.
        dist.init_process_group("gloo", timeout=timedelta(days=1))
    return dist.get_rank(), dist.get_world_size()


def _own_device(device: str | None) -> str | None:
    """Choose a device where none was asked for: each rank of a machine has a GPU of its own.

    The harness's command says ``cuda:0`` where the user says nothing, GPU or not.
    """
    if device not in (None, DEFAULT_DEVICE):
        return device
    if not torch.cuda.is_available():
        return None
    return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else device


def _warn_of_unknown_greediness(requests: Sequence[Instance], mode: Mode) -> None:
    """Name tasks that ask whether a continuation is the likeliest, where that is not known.

    Such a task has one request for each item; multiple choice has several.
    """
    items = Counter((instance.task_name, instance.doc_id) for instance in requests)
    tasks = sorted({str(name) for (name, _), count in items.items() if count == 1})
    if tasks:
        logger.warning(
            "mode %s does not tell whether an answer is the likeliest: acc of %s would be 0;"
            " use mode=ar or mode=prefix",
            mode,
            ", ".join(tasks),
        )


def _wrong(
    option: str, what: str, expected: str, word: object = "", choices: Sequence[str] = ()
) -> UserError:
    return UserError(f"--model_args {option}", what, expected, nearest(word, choices))


if __name__ == "__main__":
    sys.exit(main())
