"""Tests of: dualtrain.recipe.load, problems, checks, shipped: files, overrides, what is refused."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualtrain.common.errors import UserError, UserErrors
from dualtrain.recipe.load import dump_recipe, load_recipe
from dualtrain.recipe.schema import AlphaSchedule, RateSchedule, Recipe, SpanCorruption

MINIMAL = """\
name: tiny
alpha: 1/4
steps: 10
repetitions: 2
data:
  path: somewhere
"""


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def errors_of(name, *overrides) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_recipe(name, overrides)
    error = caught.value
    return [str(e) for e in (error.errors if isinstance(error, UserErrors) else [error])]


def only_error_of(name, *overrides) -> str:
    errors = errors_of(name, *overrides)
    assert len(errors) == 1, errors
    return errors[0]


# Reading


def test_a_recipe_has_its_values_and_the_defaults(tmp_path):
    loaded = load_recipe(write(tmp_path / "r.yaml", MINIMAL))
    assert loaded.recipe.alpha == Fraction(1, 4)
    assert loaded.recipe.optim.lr == 7e-3
    assert loaded.source == "r.yaml"
    assert loaded.origins["data.path"] == "r.yaml:6" and "optim.lr" not in loaded.origins


@pytest.mark.parametrize(
    ("text", "alpha"),
    [
        ("0.1", Fraction(1, 10)),
        ("63/64", Fraction(63, 64)),
        ("1", Fraction(1)),
        ("1e-3", Fraction(1, 1000)),
        ("' 1 / 3 '", Fraction(1, 3)),
    ],
)
def test_shares_are_exact(tmp_path, text, alpha):
    path = write(tmp_path / "r.yaml", MINIMAL.replace("1/4", text))
    assert load_recipe(path).recipe.alpha == alpha


# Everything refused


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # A typo at every level.
        ("stepps=3", "stepps: unknown key (did you mean steps?)"),
        ("lr=1e-3", "lr: unknown key (did you mean optim.lr?)"),
        ("data.pat=x", "data.pat: unknown key — expected one of path, build, append_eos,"),
        ("data.pat=x", "(did you mean path?)"),
        ("data.build={sourc: x}", "data.build.sourc: unknown key"),
        ("optim.schedule.cool_down=0.1", "unknown key — expected one of name, warmup_steps"),
        ("optim.schedule.cool_down=0.1", "(did you mean cooldown?)"),
        ("objective.corruption={name: uniform, smothing: 1}", "(did you mean smoothing?)"),
        ("objective.corruption={name: uniform, max_span: 1}", "max_span: unknown key"),
        (
            "objective.corruption={name: span, rate: {strat: 0.2}}",
            "rate.strat: unknown key — expected one of start, end (did you mean start?)",
        ),
        ("algorithms=[{use: x, arg: {}}]", "algorithms.0.arg: unknown key"),
        ("alpha={name: linear, phases: [{until: 1, alpha: 1, x: 1}]}", "alpha.phases.0.x: unknown"),
        ("optim-lr=1", "optim-lr: unknown key"),
        # Words that are not known.
        ("optim.name=mouon", "'mouon' is not known — expected muon or adamw (did you mean muon?)"),
        ("objective.corruption.name=spam", "expected uniform or span (did you mean span?)"),
        ("alpha={name: fases, phases: []}", "alpha.name: 'fases' is not known"),
        # Wrong types.
        ("seed=one", "seed: 'one' is text — expected an integer in [0, 2^63)"),
        ("model.layers=2.5", "model.layers: 2.5 is not allowed — expected an integer in [1, 2^24]"),
        ("model.layers='4'", "(write 4, without quotes)"),
        ("unique_tokens=1e6", "expected all, an integer in [1, 10^15] or null (write 1000000)"),
        ("unique_tokens=al", "unique_tokens: 'al' is not known"),
        ("unique_tokens=al", "(did you mean all?)"),
        ("steps=1_000", "(write 1000, without _)"),
        ("model.compile=yes", "'yes' is text — expected true or false (write true)"),
        ("seed=true", "seed: is true — expected an integer"),
        ("name=12", "name: 12 is not allowed — expected text"),
        ("model=", "model: is null — expected a section (leave the key out to take its default)"),
        ("optim=3", "optim: 3 is not allowed — expected a section"),
        ("data.path=[a]", "data.path: is a list — expected text"),
        ("optim.betas=[0.9]", "optim.betas.1: is missing"),
        ("optim.betas=[0.9, 1]", "optim.betas.1: 1 is not allowed — expected a number in [0, 1)"),
        ("algorithms=[{use: x, args: {a: [1]}}]", "algorithms.0.args.a: is a list"),
        # Out of range.
        ("optim.lr=0", "optim.lr: 0 is not allowed — expected a number in [1e-30, 1e6]"),
        ("optim.lr=.inf", "optim.lr: inf is not allowed"),
        ("optim.lr=.nan", "optim.lr: nan is not allowed"),
        (
            "objective.corruption={name: span, rate: {start: 0}}",
            "objective.corruption.rate.start: 0 is not allowed — expected a number in [1e-30, 1]",
        ),
        (
            "objective.corruption={name: uniform, rate: {end: 15}}",
            "objective.corruption.rate.end: 15 is not allowed — expected a number in [1e-30, 1]",
        ),
        ("objective.corruption={name: uniform, rate: 0.2}", "expected a section or null"),
        ("checkpoint.keep=1", "expected an integer in [2, 10^8] or null"),
        ("name=a b", "name: 'a b' is not allowed — expected text of letters, digits and ._- only"),
        ("alpha=3/2", "alpha: '3/2' is outside [0, 1] — expected a share in [0, 1] such as 1/8"),
        ("alpha=-0.1", "alpha: -0.1 is outside [0, 1]"),
        ("alpha=1.01", "alpha: 1.01 is outside [0, 1]"),
        ("alpha=1/0", "alpha: '1/0' is not a number or a fraction"),
        ("alpha=half", "alpha: 'half' is not a number or a fraction"),
        ("alpha='1e-999999999'", "is not a number or a fraction"),
        ("alpha=true", "alpha: true is not a number or a fraction"),
        ("optim.lr=1e39", "1e+39 is out of range: fp32 has to hold it, its products and their"),
        ("optim.lr=1e39", "— expected a number in [1e-30, 1e6]"),
        # Empty.
        ("eval.modes=[]", "eval.modes: is empty — expected a list of at least one item"),
        ("alpha={name: linear, phases: []}", "alpha.phases: is empty — expected a list of at"),
        ("data.build={source: a, separator: ''}", "separator: is empty — expected text or null"),
        # What does not go together.
        ("global_batch=17", "global_batch: 17 is not divisible by micro_batch 8"),
        ("micro_batch=3", "(nearest: global_batch 2049, or micro_batch 2)"),
        ("model.heads=3", "model.width: 1024 is not divisible by heads 3"),
        ("model.heads=1024", "model.width: 1024 is an odd number of times heads 1024"),
        (
            "unique_tokens=5",
            "steps: 10 steps of 4,194,304 tokens are not 2 repetitions of 5 unique",
        ),
        ("repetitions=null", "unique_tokens: the length of the run is open: only steps is given"),
        ("objective.corruption={name: span, keep_share: 0.95}", "is above 1"),
        (
            "alpha={name: phases, phases: [{until: 1/2, alpha: 1}, {until: 1/2, alpha: 0}]}",
            "alpha.phases.1.until: 1/2 is not after 1/2",
        ),
        (
            "alpha={name: linear, phases: [{until: 1/2, alpha: 1}]}",
            "alpha.phases.0.until: the last phase ends at 1/2 — expected 1",
        ),
        (
            "alpha={name: phases, start: 0, phases: [{until: 1, alpha: 1}]}",
            "alpha.start: 0 has no effect",
        ),
        ("optim.schedule={name: cosine, cooldown: 0.5}", "cooldown: 0.5 has no effect on a cosine"),
        ("sample.infill=no gap", "sample.infill: no gap in 'no gap'"),
        ("checkpoint.resume=", "checkpoint.resume: is null"),
        ("checkpoint.resume='weights:'", "names no checkpoint"),
    ],
)
def test_bad_values_are_named_with_what_was_expected(tmp_path, override, message):
    errors = errors_of(write(tmp_path / "r.yaml", MINIMAL), override)
    assert any(message in error for error in errors), errors
    assert all(error.startswith(("command line", "r.yaml")) for error in errors)


def test_rotation_needs_slots(tmp_path):
    path = write(tmp_path / "r.yaml", MINIMAL + "objective: {rotation: true}\n")
    error = only_error_of(path, "objective.mixing=weighted_sum")
    assert error.startswith("r.yaml:7: objective.rotation: true, but in a weighted sum")
    schedule = "alpha={name: linear, phases: [{until: 1, alpha: 0}]}"
    assert load_recipe(path, [schedule]).recipe.objective.rotation


@pytest.mark.parametrize("missing", ["name", "alpha", "data"])
def test_a_missing_key_is_named(tmp_path, missing):
    lines = [line for line in MINIMAL.splitlines() if not line.startswith((missing, "  "))]
    text = "\n".join(lines) + ("" if missing == "data" else "\n  path: x")
    path = write(tmp_path / "r.yaml", text)
    # Also when the command line has changed something else.
    for overrides in ((), ("seed=1",)):
        assert only_error_of(path, *overrides).startswith(f"r.yaml:1: {missing}: is missing")


def test_a_missing_key_of_a_section_stands_at_the_section(tmp_path):
    path = write(tmp_path / "r.yaml", MINIMAL.replace("  path: somewhere", "  append_eos: true"))
    assert only_error_of(path) == "r.yaml:5: data.path: is missing — expected text"
    path = write(tmp_path / "s.yaml", MINIMAL + "objective:\n  corruption:\n    smoothing: 0\n")
    error = only_error_of(path)
    assert error == "s.yaml:8: objective.corruption.name: is missing — expected uniform or span"


def test_a_conflict_stands_where_the_recipe_says_something(tmp_path):
    path = write(tmp_path / "r.yaml", MINIMAL + "model:\n  layers: 2\n  heads: 3\n")
    # The width is a default; the line is that of the heads.
    assert only_error_of(path).startswith("r.yaml:9: model.width: 1024 is not divisible by heads 3")


def test_all_problems_are_shown_at_once_in_the_order_of_lines(tmp_path):
    text = """\
name: tiny
alpha: 5/4
steps: 10
steps: 11
repetitions: 2
global_batch: 10
data:
  path: somewhere
model: {width: 10, heads: 3, layerz: 3}
optim:
  lr: fast
  schedule: {name: cosine, shape: one_minus_sqrt}
"""
    errors = errors_of(write(tmp_path / "r.yaml", text))
    assert [error.partition(": ")[2].partition(": ")[0] for error in errors] == [
        "steps",  # duplicate key
        "alpha",
        "global_batch",  # not divisible, although alpha and lr are refused
        "model.layerz",
        "model.width",
        "optim.lr",
        "optim.schedule.shape",
    ]
    assert [int(error.split(":")[1]) for error in errors] == [4, 2, 6, 9, 9, 11, 12]


def test_no_conflict_is_reported_about_a_value_that_is_refused_itself(tmp_path):
    path = write(tmp_path / "r.yaml", MINIMAL)
    error = only_error_of(path, "global_batch=x")
    assert "global_batch: 'x' is text" in error
    # The default of heads, 16, would not divide the width.
    assert "model.heads: 'x' is text" in only_error_of(path, "model.heads=x", "model.width=10")
    # Nor about parts of a section that is refused.
    phases = "alpha={name: phases, phases: [{until: 1/2}]}"
    assert "alpha.phases.0.alpha: is missing" in only_error_of(path, phases)


def test_what_cannot_be_read_is_said_once(tmp_path):
    path = write(tmp_path / "r.yaml", MINIMAL + "seed: " + 5000 * "9" + "\n")
    assert "is not a number that can be read" in only_error_of(path)


@pytest.mark.parametrize("text", ["- a\n", "just text\n"])
def test_a_file_that_is_no_recipe_is_said_to_be_none_whatever_else_is_asked(tmp_path, text):
    path = write(tmp_path / "r.yaml", text)
    assert only_error_of(path, "seed=1", "0=1").startswith("r.yaml:1: holds ")
    child = write(tmp_path / "child.yaml", "extends: r.yaml\n" + MINIMAL)
    assert only_error_of(child).startswith("r.yaml:1: holds ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml:1: is empty — expected a recipe"),
        ("- a\n", "r.yaml:1: holds a list — expected a recipe"),
        ("just text\n", "r.yaml:1: holds 'just text' — expected a recipe"),
        ("a: [\n", "not valid YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, text, message):
    assert message in only_error_of(write(tmp_path / "r.yaml", text))


def test_unreadable_files(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"name: \xff\n")
    assert only_error_of("r.yaml") == "r.yaml: is not UTF-8 text — expected a recipe in YAML"
    assert "is a directory" in only_error_of(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("quikstart", "did you mean quickstart?"),
        ("paper/470", "did you mean paper/470m?"),
        ("470m-r32", "did you mean paper/470m-r32?"),
        ("recipes/quickstarts.yaml", "did you mean quickstart?"),
    ],
)
def test_an_unknown_name_shows_the_nearest_and_all(name, nearest):
    error = only_error_of(name)
    assert nearest in error and "ablations/adamw" in error and error.startswith(f"{name}: no such")


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "recipes/quickstart.yaml"])
def test_shipped_recipes_are_found_by_name(name):
    assert load_recipe(name).recipe.name == "quickstart"


def test_a_file_of_the_user_comes_before_a_shipped_recipe(tmp_path):
    write(tmp_path / "quickstart.yaml", "extends: quickstart\nname: mine\n")
    assert load_recipe("quickstart.yaml").recipe.name == "mine"
    assert load_recipe("quickstart").recipe.name == "quickstart"


# extends


def test_sections_merge_and_everything_else_is_replaced(tmp_path):
    base = MINIMAL + "  build: {source: a.txt}\noptim: {lr: 1e-3, betas: [0.8, 0.9]}\n"
    write(tmp_path / "base" / "a.yaml", base)
    write(tmp_path / "base" / "b.yaml", "extends: a.yaml\nname: b\noptim: {eps: 1e-6}\n")
    path = write(
        tmp_path / "c.yaml",
        "extends: base/b.yaml\noptim: {betas: [0.5, 0.6]}\ndata: {build: null}\n",
    )
    recipe = load_recipe(path).recipe
    assert recipe.name == "b" and recipe.data.path == "somewhere" and recipe.data.build is None
    assert (recipe.optim.lr, recipe.optim.eps, recipe.optim.betas) == (1e-3, 1e-6, (0.5, 0.6))


def test_another_kind_starts_afresh(tmp_path):
    base = (
        MINIMAL + "objective: {z_loss: 0, corruption: {name: span, max_span: 5, keep_share: 0}}\n"
        "optim: {schedule: {name: wsd, cooldown: 0.5, warmup_steps: 3}}\n"
    )
    write(tmp_path / "base.yaml", base)
    kept = "extends: base.yaml\nobjective: {corruption: {max_span: 7}}\n"
    recipe = load_recipe(write(tmp_path / "kept.yaml", kept)).recipe
    assert recipe.objective.corruption == SpanCorruption(name="span", max_span=7, keep_share=0)
    other = (
        "extends: base.yaml\nobjective: {corruption: {name: uniform}}\n"
        "optim: {schedule: {name: cosine}}\nalpha: {name: linear, phases: [{until: 1, alpha: 0}]}\n"
    )
    recipe = load_recipe(write(tmp_path / "other.yaml", other)).recipe
    assert recipe.objective.corruption.name == "uniform" and recipe.objective.z_loss == 0
    assert recipe.optim.schedule.warmup_steps == 0
    assert isinstance(recipe.alpha, AlphaSchedule)
    # The command line, too; without the rule, cooldown 0.5 would be refused as unused.
    recipe = load_recipe("base.yaml", ["optim.schedule.name=cosine"]).recipe
    assert recipe.optim.schedule.cooldown == 0.25


def test_the_rate_of_a_corruption_may_be_given_in_part(tmp_path):
    base = MINIMAL + "objective: {corruption: {name: uniform}}\n"
    path = write(tmp_path / "base.yaml", base)
    assert load_recipe(path).recipe.objective.corruption.rate is None
    start = "objective.corruption.rate.start=0.4"
    rate = load_recipe(path, [start]).recipe.objective.corruption.rate
    assert rate == RateSchedule(start=0.4, end=0.15)
    loaded = load_recipe("ablations/span-masking", [start])
    assert loaded.recipe.objective.corruption.rate == rate
    again = load_recipe(write(tmp_path / "dump.yaml", loaded.text))
    assert again.recipe == loaded.recipe
    falling = base.replace("uniform", "uniform, rate: {start: 0.5, end: 0.1}")
    write(tmp_path / "falling.yaml", falling)
    over = "extends: falling.yaml\nobjective: {corruption: {rate: {end: 0.2}}}\n"
    rate = load_recipe(write(tmp_path / "over.yaml", over)).recipe.objective.corruption.rate
    assert rate == RateSchedule(start=0.5, end=0.2)
    over = over.replace("{end: 0.2}", "null")
    corruption = load_recipe(write(tmp_path / "own.yaml", over)).recipe.objective.corruption
    assert corruption.rate is None


def test_errors_name_the_file_of_the_chain_where_the_key_stands(tmp_path):
    write(tmp_path / "lib" / "base.yaml", MINIMAL + "model:\n  layers: many\n")
    path = write(
        tmp_path / "top.yaml",
        "extends: lib/base.yaml\n\nmodel:\n  widht: 8\nglobal_batch: 12\n",
    )
    errors = errors_of(path, "optim.lr=-1")
    assert [error.split(" — ")[0].split(" (")[0] for error in errors] == [
        "command line: optim.lr: -1 is not allowed",
        "lib/base.yaml:8: model.layers: 'many' is text",
        "top.yaml:4: model.widht: unknown key",
        "top.yaml:5: global_batch: 12 is not divisible by micro_batch 8",
    ]


def test_circles_and_missing_links_are_refused(tmp_path):
    write(tmp_path / "a.yaml", "name: a\nextends: b.yaml\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\n")
    error = only_error_of("a.yaml")
    assert error.startswith("b.yaml:1: extends: goes in a circle: a.yaml -> b.yaml -> a.yaml")
    write(tmp_path / "c.yaml", "extends: qickstart\n")
    error = only_error_of("c.yaml")
    assert error.startswith("c.yaml:1: extends: 'qickstart': no such file")
    assert error.endswith("(did you mean quickstart?)")
    write(tmp_path / "d.yaml", "extends: [a.yaml]\n")
    assert only_error_of("d.yaml").startswith("d.yaml:1: extends: is a list")


# Overrides


def test_later_overrides_win_and_may_index_lists(tmp_path):
    path = write(tmp_path / "r.yaml", MINIMAL + "algorithms:\n  - {use: a}\n  - {use: b}\n")
    recipe = load_recipe(
        path,
        [
            "optim.lr=1e-4",
            "optim.lr=2e-4",
            "algorithms.1.args.share=0.5",
            "alpha=0.5",
            "data.path=x=y",
            "sample.prompt='a: b'",
        ],
    ).recipe
    assert recipe.optim.lr == 2e-4 and recipe.alpha == Fraction(1, 2)
    assert [entry.use for entry in recipe.algorithms] == ["a", "b"]
    assert recipe.algorithms[1].args == {"share": 0.5}
    assert recipe.data.path == "x=y" and recipe.sample.prompt == "a: b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr", "command line: 'optim.lr' is no override — expected key=value"),
        ("=3", "is no override"),
        ("optim..lr=3", "is no override"),
        ("optim.lr=[1", "command line: optim.lr: not valid YAML"),
        ("extends=quickstart", "command line: extends: belongs into a file"),
        ("algorithms.2.use=x", "algorithms.2: no item '2' in the list — expected an index from 0"),
        ("algorithms.use=x", "no item 'use' in the list"),
        ("\udcff=1", r"command line: the key '\udcff' has half of a character"),
        ("data={'\udcff': 1}", "special characters are not allowed"),
        ("data={path: a, path: b}", "command line: data.path: duplicate key"),
    ],
)
def test_bad_overrides(tmp_path, override, message):
    text = MINIMAL + "algorithms: [{use: a}, {use: b}]\n"
    errors = errors_of(write(tmp_path / "r.yaml", text), override)
    assert any(message in error for error in errors), errors


# Writing


def test_the_dump_has_every_field_and_loads_back_equal(tmp_path):
    text = MINIMAL + "  append_eos: false\noptim: {lr: 1e-5, eps: 1e-12}\n"
    overrides = [
        "alpha={name: linear, start: 1/3, phases: [{until: 0.3, alpha: 1}, {until: 1, alpha: 0}]}",
        "algorithms=[{use: a, args: {a: '1e5', b: 1, c: 1.0, d: true, e: null, f: 'yes'}}]",
        "objective.corruption={name: span}",
        "sample.prompt='1e5'",
        "repetitions=0.1",
    ]
    loaded = load_recipe(write(tmp_path / "r.yaml", text), overrides)
    again = load_recipe(write(tmp_path / "dump.yaml", loaded.text))
    assert again.recipe == loaded.recipe
    assert dump_recipe(again.recipe) == loaded.text
    assert [type(value) for value in again.recipe.algorithms[0].args.values()] == [
        type(value) for value in loaded.recipe.algorithms[0].args.values()
    ]
    assert set(again.origins) >= {"optim.schedule.shape", "model.norm_eps", "data.prefetch_steps"}


@settings(max_examples=60, deadline=None)
@given(
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True),
    alpha=st.fractions(0, 1, max_denominator=10**6),
    lr=st.floats(1e-30, 1e6),
    prompt=st.text(st.characters(exclude_categories=["Cs", "Cc"])),
    path=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1),
)
def test_any_values_survive_the_dump(tmp_path_factory, name, alpha, lr, prompt, path):
    recipe = Recipe.model_validate(
        {
            "name": name,
            "alpha": alpha,
            "steps": 3,
            "repetitions": 1,
            "data": {"path": path},
            "optim": {"lr": lr},
            "sample": {"prompt": prompt},
        }
    )
    file = tmp_path_factory.mktemp("dump") / "r.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(str(file)).recipe == recipe
