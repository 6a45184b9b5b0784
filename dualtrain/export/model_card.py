"""The model card of an export: what was trained, on what, how well, and how to use it.

Its Python is meant to be run, in order, in the directory of the card.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from dualtrain.checkpoint import store as checkpoint
from dualtrain.checkpoint.trained import ModelSource
from dualtrain.common.formatting import count
from dualtrain.data.corpus import CorpusFacts
from dualtrain.data.dataset import DatasetInfo
from dualtrain.derived.derive import run_length
from dualtrain.export.card_results import held_out, task_scores
from dualtrain.network.config import DualConfig
from dualtrain.recipe.schema import AlphaSchedule, Recipe

_SHOWN_FILES = 10
FRONT = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- dualtrain
- masked-diffusion
---
"""
PAPER = "[Dual-objective Language Models](https://arxiv.org/abs/2512.14549)"
_LOAD = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # the directory of this file
tokenizer = AutoTokenizer.from_pretrained(path{trust})
model = AutoModelForCausalLM.from_pretrained(path{trust})


def show(ids):
    print(tokenizer.decode(ids[0], skip_special_tokens=True))


prompt = tokenizer({prompt!r}, return_tensors="pt")
show(model.generate(**prompt, max_new_tokens=24))
```
"""
_PREFIX = """\
Prefix: the prompt sees itself in both directions, the continuation is causal.

```python
show(model.generate_prefix(**prompt, max_new_tokens=24))
```
"""
_BY_DUALTRAIN = """\
The other modes are in dualtrain:

```bash
dualtrain generate . {prompt!r} --mode prefix
dualtrain generate . {prompt!r} --mode diffusion
```
"""
_DIFFUSION = """\
Masked diffusion: masked tokens are filled in, reading all of the row. One `{mask}` is one token.

```python
show(model.generate_diffusion(**prompt, max_new_tokens=24, block_length=8))
gaps = tokenizer({gaps!r}, return_tensors="pt")
show(model.infill(**gaps, steps=4))
logits = model(**gaps, attention="full").logits  # {where}
```
"""


def model_card(
    source: ModelSource,
    config: DualConfig | PretrainedConfig,
    values: Mapping[str, Any],
    parameters: int,
    names: Mapping[str, str],
) -> str:
    """The text of ``README.md``.

    Args:
        values: The export's ``config.json``.
        names: Of the special tokens, by what transformers calls their roles.
    """
    recipe, info = source.recipe, source.info
    assert recipe is not None and info is not None
    recipe_text = (source.path / checkpoint.RECIPE).read_text("utf-8").strip()
    parts = [
        f"# {source.name}",
        f"A language model of {count(parameters)} parameters with two objectives, autoregressive"
        f" and masked diffusion, after {PAPER}. Trained with dualtrain.",
        _table(_model_rows(recipe, config, values, parameters)),
        "## Training",
        _table(_training_rows(recipe, info, source.facts)),
        "## Held-out losses",
        held_out(source.facts),
        *task_scores(source.facts),
        "## Data",
        _table(_data_rows(info)),
        "## Use",
        *_usage(recipe, values, names),
        "## Limits",
        "\n".join(f"- {line}" for line in _limits(recipe, names)),
        "## Recipe",
        f"```yaml\n{recipe_text}\n```",
    ]
    return FRONT + "\n" + "\n\n".join(parts) + "\n"


def _table(rows: Iterator[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _model_rows(
    recipe: Recipe,
    config: DualConfig | PretrainedConfig,
    values: Mapping[str, Any],
    parameters: int,
) -> Iterator[tuple[str, str]]:
    yield "parameters", f"{parameters:,}, in {values['torch_dtype']}"
    yield "architecture", values["architectures"][0]
    yield (
        "size",
        f"{config.num_hidden_layers} layers, width {config.hidden_size},"
        f" {config.num_attention_heads} heads",
    )
    yield "vocabulary", f"{config.vocab_size:,} rows"
    yield "context", f"{recipe.sequence_length:,} tokens"


def _training_rows(
    recipe: Recipe, info: DatasetInfo, facts: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    train = info.splits["train"]
    length = run_length(recipe, CorpusFacts(train.tokens, train.documents, info.vocab_size))
    step, per_step = facts["step"], recipe.global_batch * recipe.sequence_length
    yield "AR share of the objective (alpha)", _alpha(recipe)
    yield (
        "diffusion predicts",
        {"next": "the next token", "in_place": "in place"}[recipe.objective.target],
    )
    yield "step", f"{step:,} of {length.steps:,}"
    yield "tokens", f"{step * per_step:,}, {recipe.global_batch} sequences a step"
    passes = step * per_step / length.unique_tokens
    yield "unique tokens", f"{length.unique_tokens:,}, seen {passes:.2f} times"
    yield "optimizer", f"{recipe.optim.name}, learning rate {recipe.optim.lr:g}"
    yield "precision", f"{facts['precision']}, ZeRO stage {facts['zero_stage']}"


def _alpha(recipe: Recipe) -> str:
    if isinstance(recipe.alpha, AlphaSchedule):
        return f"a schedule, {recipe.alpha.name}; see the recipe"
    return str(recipe.alpha)


def _data_rows(info: DatasetInfo) -> Iterator[tuple[str, str]]:
    yield "fingerprint", f"`{info.fingerprint}`"
    for split, facts in info.splits.items():
        yield (
            split,
            f"{facts.documents:,} documents, {facts.tokens:,} tokens, {facts.bytes:,} bytes",
        )
    yield "tokenizer", f"{info.vocab_size:,} tokens, SHA-256 `{info.tokenizer_sha256}`"
    for file in info.sources[:_SHOWN_FILES]:
        digest = f", SHA-256 `{file.sha256}`" if file.sha256 else ""
        yield "source", f"`{Path(file.path).name}`, {file.bytes:,} bytes{digest}"
    if len(info.sources) > _SHOWN_FILES:
        yield "source", f"and {len(info.sources) - _SHOWN_FILES:,} files more"


def _usage(recipe: Recipe, values: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[str]:
    prompt = recipe.sample.prompt or "The"
    has_code = "auto_map" in values
    if has_code:
        yield (
            "The modes beside the autoregressive one are in `modeling_dualtrain.py`, which"
            " transformers runs when it is asked to trust it."
            + (" Otherwise this is a plain Llama." if values["model_type"] == "llama" else "")
        )
    trust = ", trust_remote_code=True" if has_code else ""
    yield _LOAD.format(prompt=prompt, trust=trust).strip()
    if has_code:
        yield _PREFIX.strip()
        if recipe.alpha != 1:
            where = {"next": "token i+1", "in_place": "token i"}[recipe.objective.target]
            gaps = f"{prompt}{4 * names['mask_token']} of the"
            where = f"position i predicts {where}"
            yield _DIFFUSION.format(gaps=gaps, where=where, mask=names["mask_token"]).strip()
    else:
        yield _BY_DUALTRAIN.format(prompt=prompt).strip()
    yield (
        'Rows of different lengths: `tokenizer(texts, return_tensors="pt", padding=True)` pads them'
        " on the left, as generating needs it. `dualtrain generate` and `dualtrain eval` open this"
        " directory, too."
    )


def _limits(recipe: Recipe, names: Mapping[str, str]) -> Iterator[str]:
    yield "A base model: it continues text, and follows no instructions."
    yield (
        "It has learnt from the text named above and has its errors and biases; nothing was done"
        " about what it may say."
    )
    yield (
        f"Trained on sequences of {recipe.sequence_length:,} tokens; longer rows work, worse."
        f" A row is one document, and begins with `{names['bos_token']}`, which the tokenizer puts"
        " there."
    )
    if recipe.alpha == 1:
        yield "Trained without diffusion: it has not learnt to fill in masked tokens."
    elif recipe.alpha == 0:
        yield "Trained without the autoregressive objective: causal and prefix modes are untrained."
    else:
        yield "Prefix mode is no mode it was trained for; the two objectives give it."
    yield (
        "Diffusion knows no end of a text: it fills what it is given. Losses of masked tokens are"
        " bounds, and not comparable with autoregressive ones token by token."
    )
    yield (
        f"The names of special tokens in a text, such as `{names['mask_token']}`, are read as these"
        " tokens, a mask with the white space before it;"
        " `tokenizer(text, split_special_tokens=True)` reads them as text, as training did."
    )
