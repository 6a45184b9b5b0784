"""The recipe: every setting of a run, described once.

A field's description here is the single source for ``dualtrain schema``, the README's recipe
reference and the messages about wrong values. Nothing here does any work: ``load`` reads a file
into these classes, ``derive`` computes the numbers that follow from them, ``engine.config`` turns
them into a DeepSpeed configuration.

Units: ``steps`` are optimizer updates, batches are counted in sequences, lengths in tokens.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainSerializer,
    PlainValidator,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core.core_schema import CoreSchema, no_info_after_validator_function

LARGEST_STEPS = 10**8
LARGEST_TEMPERATURE = 1e3

SHARE_PATTERN = r"[+-]?(\d{1,20} */ *\d{1,20}|\d{1,20}(\.\d{0,20})?|\.\d{1,20})"


def parse_share(value: object) -> Fraction:
    """Read a share such as ``1/8``, ``0.125`` or ``1`` as an exact fraction.

    A decimal is taken at its written value: ``0.1`` is one tenth, not the nearest binary number.

    Raises:
        ValueError: It is no number or fraction, or outside [0, 1].
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str, Fraction)):
        raise ValueError("is not a number or a fraction")
    text = str(value).strip()
    # Of text only what the pattern describes: an exponent could ask for gigabytes of digits.
    if isinstance(value, str) and not re.fullmatch(SHARE_PATTERN, text):
        raise ValueError("is not a number or a fraction")
    try:
        share = Fraction(text.replace(" ", ""))
    except (ValueError, ZeroDivisionError):
        raise ValueError("is not a number or a fraction") from None
    if not 0 <= share <= 1:
        raise ValueError("is outside [0, 1]")
    return share


def _plain_share(share: Fraction) -> int | str:
    return share.numerator if share.denominator == 1 else str(share)


Share = Annotated[
    Fraction,
    PlainValidator(parse_share),
    PlainSerializer(_plain_share, return_type=int | str),
    WithJsonSchema(
        {
            "title": "Share",
            "anyOf": [
                {"type": "number", "minimum": 0, "maximum": 1},
                {"type": "string", "pattern": f"^ *{SHARE_PATTERN} *$"},
            ],
        }
    ),
]


@dataclass(frozen=True)
class Limits:
    """Refuses numbers that no machine could work with, and says why; 0 is for the field to refuse.

    Numbers that make no sense have bounds of the field instead.
    """

    lowest: float
    highest: float
    why: str

    def check(self, number: float) -> float:
        """The number; ValueError if it is beyond the limits."""
        if number > self.highest or 0 < number < self.lowest:
            raise ValueError(f"is out of range: {self.why}")
        return number

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler):
        return no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler):
        node = handler(schema)
        node["maximum"] = min(self.highest, node.get("maximum", self.highest))
        if node.get("exclusiveMinimum") == 0:
            del node["exclusiveMinimum"]
            node["minimum"] = self.lowest
        return node


_FACTOR = Limits(1e-30, 1e6, "fp32 has to hold it, its products and their squares")
_TEMPERATURE = Limits(0, LARGEST_TEMPERATURE, "all tokens are equally likely long before")
_SECONDS = Limits(
    1, 10**6, "ranks need a moment to answer, and the libraries count milliseconds in 32 bits"
)
_STEPS = Limits(1, LARGEST_STEPS, "a step a millisecond would take a day")
_COUNT = Limits(1, 10**15, "nobody has as much text")
_SIZE = Limits(1, 2**24, "products of two sizes have to fit into 64 bits")

Factor = Annotated[float, _FACTOR]
Steps = Annotated[int, _STEPS]
Count = Annotated[int, _COUNT]
Size = Annotated[int, _SIZE]


def _read_path(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError("names no file: it is empty" if not text else "has a NUL character")
    return os.path.expanduser(text)


def _read_start(text: str) -> str:
    """Read ``checkpoint.resume``: a word, or a path that may have a prefix."""
    prefix, colon, path = text.partition(":")
    return f"{prefix}:{_read_path(path)}" if colon and path else _read_path(text) if text else text


PathText = Annotated[str, AfterValidator(_read_path)]
"""The path or the name of something: ``~`` in front means the home directory."""


class Section(BaseModel):
    """Base of every part of a recipe: unknown keys are errors, values do not change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


class AlphaPhase(Section):
    """One phase of an alpha curriculum."""

    until: Share = Field(description="End of the phase, as a share of all steps.")
    alpha: Share = Field(description="AR share at the end of the phase.")


class AlphaSchedule(Section):
    """An AR share that changes during training."""

    name: Literal["phases", "linear"] = Field(
        description="phases: each phase keeps its alpha; linear: straight lines between the ends."
    )
    start: Share = Field(default=Fraction(1), description="Alpha at step 0 (linear only).")
    phases: list[AlphaPhase] = Field(
        min_length=1, description="In increasing order of `until`; the last one ends at 1."
    )


def _alpha_kind(value: object) -> str:
    return "schedule" if isinstance(value, (dict, AlphaSchedule)) else "share"


Alpha = Annotated[
    Annotated[Share, Tag("share")] | Annotated[AlphaSchedule, Tag("schedule")],
    Discriminator(_alpha_kind),
]


class BuildSection(Section):
    """How to make the dataset when it is not there yet."""

    source: PathText | list[PathText] = Field(
        description="`builtin:python-docs`, a file, a directory, a glob pattern, `-` for standard "
        "input, or a list of these.",
    )
    val_source: PathText | list[PathText] | None = Field(
        default=None,
        description="What is held out, all of it, such as a corpus's own validation split; named "
        "and read as `source` is. null: a part of `source`, by val_fraction or val_tokens.",
    )
    format: str | None = Field(
        default=None,
        description="Kind of standard input and of files whose name does not say it, as the usual "
        "suffix: `txt`, `jsonl`, …, or `tokens`; null: JSON lines for standard input, an error for "
        "files.",
    )
    text_field: str = Field(
        default="text",
        description="Field or column that holds the text of a document; `a.b` in another, `a[]` "
        "for each string of a list.",
    )
    separator: str | None = Field(
        default=None,
        min_length=1,
        description="What divides documents in text files: `blank-line` or any text; in token ids: "
        "an id. null: a file of text, or a row of ids, is one document.",
    )
    on_error: Literal["stop", "skip"] = Field(
        default="stop",
        description="What to do about input that cannot be read: stop, or leave it out and say so.",
    )
    min_characters: Count = Field(
        default=0, ge=0, description="Leave out documents with fewer characters."
    )
    max_characters: Annotated[int, Field(ge=1), _COUNT] | None = Field(
        default=None, description="Leave out documents with more characters."
    )
    drop_duplicates: bool = Field(
        default=False, description="Keep only the first of documents with the same text."
    )
    tokenizer: PathText | None = Field(
        default=None,
        description="A tokenizer.json, a directory that holds one, a tiktoken rank file or the "
        "name of a tiktoken encoding; null: one is trained on the source.",
    )
    tokenizer_pattern: str | None = Field(
        default=None,
        description="How a rank file's tokenizer divides text: `gpt2`, `cl100k_base`, "
        "`o200k_base` or a regular expression.",
    )
    vocab_size: Size = Field(
        default=4096, ge=272, le=2**20, description="Vocabulary of the tokenizer that is trained."
    )
    val_fraction: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Share of documents held out, chosen by document hash; null: 0.05, or as many "
        "as val_tokens needs.",
    )
    val_tokens: Annotated[int, Field(ge=1), _COUNT] | None = Field(
        default=None,
        description="Hold out documents in order of their hashes until they have this many tokens; "
        "what val_fraction chose beyond them is left out.",
    )
    max_tokens: Annotated[int, Field(ge=1), _COUNT] | None = Field(
        default=None,
        description="End the train split with the document that reaches this many tokens.",
    )
    shuffle_seed: Count | None = Field(
        default=0,
        description="Seed of the document order on disk, which decides subsets; null keeps it.",
    )

    @property
    def sources(self) -> list[str]:
        """The sources, one or several."""
        return [self.source] if isinstance(self.source, str) else self.source

    @property
    def val_sources(self) -> list[str]:
        """What is held out as a whole; none, one or several."""
        given = self.val_source or []
        return [given] if isinstance(given, str) else given


REMOVED: dict[tuple[str, ...], str] = {
    ("data", "cache_limit_gib"): "shards of the unique tokens stay in data.path, all of them"
}
"""Settings of earlier versions: recipes in checkpoints may have them, those of users may not."""


class DataSection(Section):
    """Where the text comes from."""

    @model_validator(mode="before")
    @classmethod
    def _without_removed(cls, values: object) -> object:
        removed = {path[-1] for path in REMOVED if path[0] == "data"}
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if key not in removed}

    path: PathText = Field(
        description="Directory of MDS shards with `train/` and `val/` splits; with `remote`, of "
        "its local copy.",
    )
    build: BuildSection | None = Field(
        default=None,
        description="Makes `path` first when it does not exist; null demands that it exists. "
        "`data.path=DIR` on the command line takes another dataset that is there as it is.",
    )
    append_eos: bool = Field(
        default=True,
        description="End each document with `</s>`, so that a text that is written from left to "
        "right can end; the released code does not.",
    )
    document_mask: bool = Field(
        default=True,
        description="Attention ends at the borders of documents; false: a position also sees the "
        "other documents of its sequence, in training and in held-out evaluation.",
    )
    prefetch_steps: int = Field(
        default=4, ge=1, le=64, description="Steps of data prepared ahead in the background."
    )
    remote: PathText | None = Field(
        default=None,
        description="Dataset to read through a copy in `path`: `s3://bucket/directory`, `gs://`, "
        "`hf://` or a directory; shards are fetched when they are needed.",
    )


class ModelSection(Section):
    """The transformer."""

    hf: PathText | None = Field(
        default=None,
        description="A Hugging Face decoder in place of ours, with its own sizes: a directory, or "
        "a name on the hub, `NAME@REVISION` too; llama, qwen2, qwen3, mistral, gpt2 or gpt_neox.",
    )
    hf_init: Literal["weights", "scratch"] = Field(
        default="weights",
        description="weights: go on from those of `hf`; scratch: only its configuration, with its "
        "family's own initial values.",
    )
    layers: Size = Field(default=24, ge=1, description="Transformer blocks.")
    width: Size = Field(default=1024, ge=8, description="Width of the residual stream.")
    heads: Size = Field(
        default=16, ge=1, description="Attention heads; `width` is divisible by them."
    )
    mlp_width: Size = Field(default=3554, ge=8, description="Hidden width of the SwiGLU MLP.")
    vocab_size: Annotated[int, Field(ge=8), _SIZE] | None = Field(
        default=None,
        description="Rows of the embedding; null takes the dataset's, rounded up to 64.",
    )
    rope_theta: Factor = Field(
        default=160_000.0, gt=0, description="Base of the rotary frequencies."
    )
    norm_eps: Factor = Field(default=1e-7, gt=0, description="Epsilon of RMSNorm.")
    head: Literal["paper", "linear"] = Field(
        default="paper",
        description="paper: norm, linear, GELU, linear with bias; linear: Llama's layout.",
    )
    attention: Literal["auto", "sdpa", "varlen", "flex"] = Field(
        default="auto",
        description="Attention backend; auto is sdpa on CPU, varlen or flex on CUDA.",
    )
    compile: bool = Field(
        default=False, description="Compile the model with torch.compile, one graph per objective."
    )
    activation_checkpointing: bool = Field(
        default=False, description="Recompute each block in the backward pass to save memory."
    )


class RateSchedule(Section):
    """A share of tokens that moves in a straight line over the run, as in GPT-BERT."""

    start: Factor = Field(default=0.3, gt=0, le=1, description="Rate at step 0.")
    end: Factor = Field(
        default=0.15,
        gt=0,
        le=1,
        description="Rate at the end: step n of N has start + (end - start) * n / N.",
    )


Rate = Annotated[
    RateSchedule | None,
    Field(
        description="Share of tokens to choose, the same for all rows of a step: a diffusion loss "
        "is then a mean per chosen token, no bound. Null, the default of uniform: each row draws "
        "its own from (0, 1), as in the paper."
    ),
]


class UniformCorruption(Section):
    """The paper: single tokens become the mask token, at any rate."""

    name: Literal["uniform"] = Field(
        default="uniform", description="uniform: masked diffusion; span: GPT-BERT's short spans."
    )
    rate: Rate = None
    smoothing: float = Field(
        default=1e-4, ge=0, lt=1, description="The weight is 1 / ((1 - smoothing) * p + smoothing)."
    )


class SpanCorruption(Section):
    """GPT-BERT: short spans, a rate that falls during the run, BERT's 80/10/10."""

    name: Literal["span"] = Field(description="Short spans, mostly masked.")
    rate: Rate = RateSchedule()
    max_span: Size = Field(
        default=3, ge=1, description="Longest span, in tokens; lengths are uniform from 1."
    )
    random_share: float = Field(
        default=0.1, ge=0, le=1, description="Share of chosen tokens replaced by a random token."
    )
    keep_share: float = Field(
        default=0.1, ge=0, le=1, description="Share of chosen tokens left as they are."
    )


class ObjectiveSection(Section):
    """What is trained, and how the two objectives are mixed."""

    mixing: Literal["slots", "weighted_sum"] = Field(
        default="slots",
        description="slots: each micro-batch has one objective; weighted_sum: both on every batch.",
    )
    rotation: bool | None = Field(
        default=None,
        description="The objectives share each pass over the text: every token is read once in it, "
        "and alpha*R times by AR, to within one. false: each goes through all of the text at its "
        "own pace. null: true unless mixing is weighted_sum.",
    )
    ar_weight: Factor = Field(
        default=1.0, gt=0, description="Factor on the AR loss (paper 1.0, released code 2.0)."
    )
    z_loss: Factor = Field(
        default=1e-4, ge=0, description="Factor on the squared log-sum-exp of the logits."
    )
    target: Literal["next", "in_place"] = Field(
        default="next",
        description="What diffusion predicts at i: token i+1 (MNTP) or token i (in place).",
    )
    corruption: Annotated[UniformCorruption | SpanCorruption, Field(discriminator="name")] = Field(
        default=UniformCorruption(), description="How the diffusion objective's input is corrupted."
    )


class ScheduleSection(Section):
    """Learning rate over the run, a pure function of the step."""

    name: Literal["wsd", "cosine", "constant"] = Field(
        default="wsd",
        description="wsd: warm-up, stable, decay; cosine: to `final` over the whole run.",
    )
    warmup_steps: Steps = Field(default=0, ge=0, description="Linear warm-up from 0.")
    cooldown: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="Share of the run, at its end, that decays (wsd only).",
    )
    shape: Literal["linear", "one_minus_sqrt"] = Field(
        default="linear", description="Shape of the decay (wsd only)."
    )
    final: float = Field(
        default=0.0, ge=0, le=1, description="Factor on lr at the end of the decay."
    )


class OptimSection(Section):
    """Optimizer and learning rate."""

    name: Literal["muon", "adamw"] = Field(
        default="muon",
        description="muon: Muon for the body's matrices, AdamW for the rest; adamw: AdamW for all.",
    )
    lr: Factor = Field(default=7e-3, gt=0, description="Peak learning rate, of both optimizers.")
    weight_decay: Factor = Field(
        default=0.1,
        ge=0,
        description="Decoupled decay: p <- p * (1 - lr * weight_decay), on everything.",
    )
    momentum: float = Field(default=0.95, ge=0, lt=1, description="Muon's momentum (Nesterov).")
    newton_schulz: Literal["gram", "standard"] = Field(
        default="standard",
        description="DeepSpeed's Newton-Schulz kernel, 5 steps (gram: fewer FLOPs, fp16).",
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.95), description="AdamW's betas."
    )
    eps: Factor = Field(default=1e-8, gt=0, description="AdamW's epsilon.")
    clip_norm: Annotated[float, Field(gt=0), _FACTOR] | None = Field(
        default=None,
        description="Largest global L2 norm of the raw gradient; null: no clipping, as in the "
        "paper.",
    )
    schedule: ScheduleSection = Field(
        default=ScheduleSection(), description="Learning-rate schedule."
    )


class EngineSection(Section):
    """DeepSpeed."""

    deepspeed: PathText = Field(
        default="zero1",
        description="A shipped ds_config (zero0, zero1, zero2, zero3) or a path to one.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="bf16", description="Compute precision; master weights are fp32 in both."
    )
    timeout_s: Annotated[float, _SECONDS] = Field(
        default=1800.0,
        gt=0,
        description="Longest wait of a rank for the others before it fails, seconds.",
    )
    skip_non_finite: Steps = Field(
        default=0,
        ge=0,
        description="Steps with a loss that is not finite that the run may leave out; the next "
        "one stops it (0: the first).",
    )


class EvalSection(Section):
    """Held-out losses in all three modes, and tasks."""

    interval_steps: Steps = Field(
        default=0, ge=0, description="Steps between evaluations; 0: only at the end."
    )
    sequences: Count = Field(
        default=256,
        ge=1,
        description="Held-out sequences scored, at most; text and masks never change.",
    )
    best: Literal["ar", "diffusion", "prefix"] | None = Field(
        default=None,
        description="Held-out loss whose lowest value has a checkpoint, which is kept; null: none.",
    )
    patience: Annotated[int, Field(ge=1), _STEPS] | None = Field(
        default=None,
        description="Evaluations without a lower one after which the run stops early; null: it "
        "never does.",
    )
    tasks: list[str] = Field(
        default=[], description="Zero-shot tasks scored during the run, by name, such as `blimp`."
    )
    tasks_dir: PathText | None = Field(
        default=None,
        description="Directory with the data of tasks, and task files of your own; null: data is "
        "fetched from the hub.",
    )
    modes: list[Literal["ar", "prefix", "pll", "chain", "elbo"]] = Field(
        default=["ar"], min_length=1, description="How the answers of tasks are scored."
    )
    limit: Annotated[int, Field(ge=1), _COUNT] | None = Field(
        default=200,
        description="Items scored of each task, spread over its data; null: all.",
    )
    task_interval_steps: Steps = Field(
        default=0,
        ge=0,
        description="Steps between evaluations that score the tasks, too; 0: only at the end.",
    )


class MilestoneSection(Section):
    """Checkpoints beside those at intervals."""

    words: (
        Literal["strict-small", "strict"]
        | Annotated[list[Annotated[int, Field(ge=1), _COUNT]], Field(min_length=1)]
    ) = Field(
        description="Words of text seen, repeated ones counted again, which white space divides: a "
        "list of numbers, or a track of the BabyLM challenge (1M to 10M, 20M to 100M; strict also "
        "200M to 1000M)."
    )


class CheckpointSection(Section):
    """Saving and resuming."""

    interval_steps: Steps = Field(
        default=0, ge=0, description="Steps between checkpoints; 0: only at the end."
    )
    at: MilestoneSection | None = Field(
        default=None, description="Checkpoints at words seen, all of which are kept."
    )
    keep: Annotated[int, Field(ge=2), _STEPS] | None = Field(
        default=None,
        description="Newest checkpoints kept, beside that of eval.best; null keeps all of them.",
    )
    resume: Annotated[str, AfterValidator(_read_start)] = Field(
        default="auto",
        description="auto: continue the newest whole checkpoint if there is one; must; never; "
        "a checkpoint directory; or `weights:PATH` to start from weights only.",
    )


class ProgressSection(Section):
    """What the user sees."""

    interval_steps: Steps = Field(
        default=10, ge=1, description="Steps between records in metrics.jsonl."
    )
    trackers: list[str] = Field(
        default=[],
        description="What else gets the records, such as `wandb`; dualtrain/progress/README.md "
        "lists them.",
    )

    @model_validator(mode="before")
    @classmethod
    def _with_old_tensorboard(cls, values: object) -> object:
        """Read ``tensorboard: true`` of earlier versions as the tracker that it means."""
        if not isinstance(values, dict) or not isinstance(values.get("tensorboard"), bool):
            return values
        rest = {key: value for key, value in values.items() if key != "tensorboard"}
        trackers = rest.get("trackers", [])
        if values["tensorboard"] and isinstance(trackers, list) and "tensorboard" not in trackers:
            rest["trackers"] = [*trackers, "tensorboard"]
        return rest


class SampleSection(Section):
    """Text generated when the run ends."""

    at_evaluations: bool = Field(
        default=False, description="Also at every evaluation, as records in metrics.jsonl."
    )

    prompt: str = Field(default="", description="Prompt of the AR sample; empty starts a document.")
    infill: str = Field(
        default="",
        description="Text with `<mask:N>` gaps for the diffusion sample; empty makes none.",
    )
    tokens: Size = Field(default=48, ge=0, description="Tokens of the AR sample; 0 makes none.")
    temperature: Annotated[float, _TEMPERATURE] = Field(
        default=0.8, ge=0, description="Sampling temperature; 0 is greedy."
    )


class AlgorithmEntry(Section):
    """One extra algorithm, run after the built-in ones."""

    use: str = Field(description="A registered name, or `module:Class` of your own.")
    args: dict[str, bool | int | float | str | None] = Field(
        default_factory=dict, description="Keyword arguments of the algorithm."
    )


class Recipe(Section):
    """One run, completely."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run and of its directory."
    )
    run_dir: PathText | None = Field(
        default=None, description="Directory of checkpoints, metrics and logs; null is runs/NAME."
    )
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="Decides initialisation, data order and masks."
    )

    alpha: Alpha = Field(
        description="AR share: 1 is purely autoregressive, 0 purely diffusion; or a schedule of it."
    )
    steps: Annotated[int, Field(ge=1), _STEPS] | None = Field(
        default=None, description="Optimizer updates."
    )
    unique_tokens: Annotated[int, Field(ge=1), _COUNT] | Literal["all"] | None = Field(
        default=None,
        description="Tokens of the unique subset (a prefix of the corpus), or `all` of it.",
    )
    repetitions: Annotated[float, Field(gt=0), _FACTOR] | None = Field(
        default=None,
        description="Passes over the unique subset. Two of steps, unique_tokens and "
        "repetitions fix the third.",
    )
    sequence_length: Size = Field(default=2048, ge=2, description="Tokens a sequence (T).")
    global_batch: Size = Field(default=2048, ge=1, description="Sequences a step, over all ranks.")
    micro_batch: Size = Field(
        default=8, ge=1, description="Sequences a slot: one forward pass of one rank."
    )

    data: DataSection = Field(description="Where the text comes from.")
    model: ModelSection = Field(default=ModelSection(), description="The transformer.")
    objective: ObjectiveSection = Field(
        default=ObjectiveSection(), description="The two objectives."
    )
    optim: OptimSection = Field(default=OptimSection(), description="Optimizer and schedule.")
    algorithms: list[AlgorithmEntry] = Field(
        default_factory=list, description="Extra algorithms, in order."
    )
    engine: EngineSection = Field(default=EngineSection(), description="DeepSpeed and precision.")
    eval: EvalSection = Field(default=EvalSection(), description="Held-out losses and tasks.")
    checkpoint: CheckpointSection = Field(
        default=CheckpointSection(), description="Saving and resuming."
    )
    progress: ProgressSection = Field(
        default=ProgressSection(), description="Records and live view."
    )
    sample: SampleSection = Field(default=SampleSection(), description="Samples at the end.")

    @property
    def directory(self) -> Path:
        """The directory of the run's checkpoints, metrics and logs."""
        return Path(self.run_dir or f"runs/{self.name}")
