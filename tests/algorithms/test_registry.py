"""Tests of: dualtrain.algorithms.registry.

From the recipe's list to algorithms, and every mistake a user can make in it.
"""

import sys

import pytest

from dualtrain.algorithms.registry import ALWAYS, REGISTRY, build_algorithms
from dualtrain.common.errors import UserError, UserErrors
from dualtrain.recipe.schema import Recipe

MODULE = '''
from dualtrain.algorithms.events import Algorithm

class Good(Algorithm):
    def __init__(self, *, strength: float, warm: bool = False):
        if strength < 0:
            raise ValueError("strength is negative")
        self.strength, self.warm = strength, warm
    def match(self, event, state): return False
    def apply(self, event, state, logger): pass

class Duck:
    """Not derived from Algorithm, but all there, without arguments."""
    def match(self, event, state): return False
    def apply(self, event, state, logger): pass
    def state_dict(self): return {}
    def load_state_dict(self, state_dict): pass

class Open(Duck):
    def __init__(self, **options): self.options = options

class Forgetful:
    """Derived from nothing, it has to say what it keeps."""
    def match(self, event, state): return False
    def apply(self, event, state, logger): pass

class Unrelated:
    pass

instance = Duck()
'''


def recipe(*entries):
    entries = [{"use": e} if isinstance(e, str) else {"use": e[0], "args": e[1]} for e in entries]
    return Recipe.model_validate(
        {"name": "test", "alpha": "1/2", "steps": 4, "data": {"path": "d"}, "algorithms": entries}
    )


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module beside the recipe, in the directory that the command is run in."""
    (tmp_path / "my_algorithms.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("x = 1\ny = x / 0\n")
    (tmp_path / "needy.py").write_text("import does_not_exist_either\n")
    (tmp_path / "older.py").write_text("from dualtrain.events import Algorithm\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    yield
    for name in ("my_algorithms", "broken", "needy", "older"):
        sys.modules.pop(name, None)


def refusal(*entries):
    with pytest.raises(UserError) as caught:
        build_algorithms(recipe(*entries))
    return str(caught.value)


def names(algorithms):
    return [type(algorithm).__name__ for algorithm in algorithms]


def test_built_in_ones_come_first_then_the_recipes_in_its_order(module):
    built = build_algorithms(recipe("my_algorithms:Duck", ("input_masking", {"share": 0.5})))
    assert names(built) == ["DualObjective", "Duck", "InputMasking"]
    assert built[2].share == 0.5


def test_arguments_reach_the_users_class(module):
    good = build_algorithms(recipe(("my_algorithms:Good", {"strength": 2.0, "warm": True})))[1]
    assert (good.strength, good.warm) == (2.0, True)
    free = build_algorithms(recipe(("my_algorithms:Open", {"anything": "goes"})))[1]
    assert free.options == {"anything": "goes"}


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_registered_name_builds_with_its_defaults(name):
    assert names(build_algorithms(recipe(name)))[1:] == [REGISTRY[name].__name__]


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ("input_maskng", ["algorithms.0.use: no algorithm `input_maskng`", "mean input_masking?"]),
        ("zzz", ["no algorithm `zzz`", "module:Class"]),
        ("nowhere:Thing", ["cannot import `nowhere`: no module `nowhere`", "PYTHONPATH"]),
        ("my_algorithms:god", ["`my_algorithms` has no `god`", "my_algorithms.py"]),
        ("my_algorithms:Goood", ["has no `Goood`", "did you mean Good?"]),
        ("my_algorithms:Forgetful", ["not an algorithm: it lacks state_dict, load_state_dict"]),
        ("my_algorithms:Unrelated", ["it lacks match, apply, state_dict, load_state_dict"]),
        ("my_algorithms:instance", ["not an algorithm: it is not a class"]),
        ("broken:Thing", ["importing `broken` failed: ZeroDivisionError", "broken.py:2]"]),
        ("older:Thing", ["No module named", "dualtrain.events is dualtrain.algorithms now"]),
        ("needy:Thing", ["importing `needy` failed: ModuleNotFoundError", "needy.py:1]"]),
        ("my_algorithms:Good", ["algorithms.0.args: Good: `strength` missing", "strength, warm"]),
        (("my_algorithms:Good", {"strengh": 1}), ["no argument `strengh` and `strength` missing"]),
        (("my_algorithms:Good", {"strengh": 1}), ["did you mean strength?"]),
        (("my_algorithms:Duck", {"a": 1, "b": 2}), ["no argument `a`, `b`", "no arguments"]),
        (("my_algorithms:Good", {"strength": -1}), ["refuses", "strength is negative", ".py:7]"]),
        (("input_masking", {"share": 2}), ["algorithms.0.args", "share is 2, not a probability"]),
    ],
)
def test_each_mistake_is_named_with_the_way_out(module, entry, parts):
    message = refusal(entry)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("name", sorted(ALWAYS))
def test_what_runs_always_is_not_added_again(name):
    message = refusal(name)
    assert f"`{name}` runs always" in message and ALWAYS[name] in message


def test_all_mistakes_are_shown_at_once(module):
    with pytest.raises(UserErrors) as caught:
        build_algorithms(recipe("zzz", "my_algorithms:Duck", "my_algorithms:Unrelated"))
    where = [error.where for error in caught.value.errors]
    assert where == ["algorithms.0.use", "algorithms.2.use"]
