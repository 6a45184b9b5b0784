"""Tokens per second of CPU time: with the cache, in batches, and beside transformers.

    python tests/benchmarks/generation.py RUN [--rounds 5] [--tokens 128] [--texts 16]

RUN is a trained run or checkpoint. Each comparison is made in turns, one of each a round, on one
thread: greedy text with the cache against a pass over the whole row for every token; texts at once
against one by one, autoregressive and diffusion; and, on a Llama of the same sizes with random
weights, against transformers' own ``generate``, single and in a batch. Prints the medians and the
median of the rounds' ratios. That both sides write the same text is checked.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from helpers.models import to_llama

from dualtrain.checkpoint.trained import open_trained
from dualtrain.common import randomness
from dualtrain.common.vocabulary import Vocabulary
from dualtrain.generate.autoregressive import continue_prompts
from dualtrain.generate.diffusion import fill_masks
from dualtrain.generate.prompts import encode_prompt
from dualtrain.generate.rows import allowed_logits
from dualtrain.generate.settings import Settings
from dualtrain.model.handle import ModelHandle
from dualtrain.network.attention import plan_attention
from dualtrain.network.transformer import DualLM

PROMPT = "It was a dark night, and the rain fell in torrents; she looked out of the window"

Texts = list[list[int]]


def whole_rows(model: ModelHandle, prompt: list[int], tokens: int) -> list[int]:
    """Greedy text by a pass over the row so far for every token."""
    ids = list(prompt)
    with model.inference():
        for _ in range(tokens):
            row = torch.tensor([ids])
            plan = plan_attention("causal", torch.zeros_like(row), backend="sdpa", device="cpu")
            last = torch.tensor([len(ids) - 1])
            ids.append(int(allowed_logits(model, row, plan, last, may_stop=False).argmax()))
    return ids[len(prompt) :]


def cached(model: ModelHandle, prompts: Texts, tokens: int) -> Texts:
    generators = [randomness.generator(0, "generate", row) for row in range(len(prompts))]
    settings = Settings(tokens=tokens, temperature=0)
    found = continue_prompts(model, prompts, settings, generators=generators)
    return [list(one.ids) for one in found]


def diffused(model: ModelHandle, prompts: Texts, tokens: int) -> Texts:
    generators = [randomness.generator(0, "generate", row) for row in range(len(prompts))]
    rows = [[*prompt, *[model.vocabulary.mask_id] * tokens] for prompt in prompts]
    settings = Settings(steps=tokens // 2, block=32, temperature=0)
    return fill_masks(model, rows, settings, generators=generators)


def compare(
    name: str,
    tokens: int,
    rounds: int,
    mine: Callable[[], Texts],
    other: Callable[[], Texts],
) -> None:
    """Time two ways to the same text in turns, and print tokens per second and their ratio."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        texts = []
        for times, make in zip(seconds, (mine, other), strict=True):
            began = time.process_time()
            texts.append(make())
            times.append(time.process_time() - began)
        same = sum(a == b for a, b in zip(*texts, strict=True)) / len(texts[0])
    # The first round warms up.
    rates = [statistics.median(tokens / s for s in times[1:]) for times in seconds]
    ratios = [b / a for a, b in zip(seconds[0][1:], seconds[1][1:], strict=True)]
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(
        f"{name:46} {rates[0]:8.0f} {rates[1]:8.0f} {statistics.median(ratios):6.2f}  {spread:14}"
        f" {same:6.0%}"
    )


def llama_like(model: ModelHandle, network: DualLM) -> tuple[ModelHandle, torch.nn.Module]:
    """A model of the same sizes with the linear head and random weights, and its Llama."""
    plain = DualLM(replace(network.config, head="linear")).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    rows = plain.config.vocab_size
    ids = Vocabulary(size=rows, special_ids=(), bos_id=1, eos_id=2, mask=None)
    return ModelHandle(model=plain, vocabulary=ids, context=model.context), to_llama(plain)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--texts", type=int, default=16)
    options = parser.parse_args()
    tokens, texts, rounds = options.tokens, options.texts, options.rounds
    trained = open_trained(options.run, device="cpu")
    endless = replace(trained, vocabulary=replace(trained.vocabulary, stop_ids=()))
    prompt = encode_prompt(PROMPT, trained.tokenizer, bos_id=trained.vocabulary.bos_id)
    several = [prompt[: 4 + row % (len(prompt) - 3)] for row in range(texts)]
    print(f"{trained.source.name}: prompt of {len(prompt)} tokens, {tokens} new, {texts} texts")
    print(f"{'':46} {'tokens/s':>8} {'against':>8} {'ratio':>6}  {'':14} {'equal':>6}")
    compare(
        "cache / whole rows",
        tokens,
        rounds,
        lambda: cached(endless, [prompt], tokens),
        lambda: [whole_rows(endless, prompt, tokens)],
    )
    compare(
        f"{texts} texts at once / one by one",
        tokens * texts,
        rounds,
        lambda: cached(endless, several, tokens),
        lambda: [cached(endless, [one], tokens)[0] for one in several],
    )
    compare(
        f"diffusion, {texts} texts at once / one by one",
        tokens * texts,
        max(1, rounds // 2),
        lambda: diffused(endless, several, tokens),
        lambda: [diffused(endless, [one], tokens)[0] for one in several],
    )
    assert isinstance(trained.model, DualLM)
    random, llama = llama_like(trained, trained.model)

    def transformers(prompts: Texts) -> Texts:
        ids = torch.tensor(prompts)
        found = llama.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return found[:, ids.shape[1] :].tolist()

    alike = [[*prompt[:-1], 100 + row] for row in range(texts)]
    for count in (1, texts):
        compare(
            f"{count} at once / transformers' generate",
            tokens * count,
            rounds,
            lambda count=count: cached(random, alike[:count], tokens),
            lambda count=count: transformers(alike[:count]),
        )


if __name__ == "__main__":
    main()
