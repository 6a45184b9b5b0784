"""Tests of: dualtrain.algorithms.events.

Who is called when, in which order, and what happens when one of them fails.
"""

import inspect
import re

import pytest
import torch

from dualtrain.algorithms.events import (
    Algorithm,
    AlgorithmError,
    Dispatcher,
    Event,
    State,
)
from dualtrain.common.errors import UserError
from dualtrain.common.vocabulary import Vocabulary


class Log:
    def __init__(self):
        self.values = {}

    def log(self, name, value):
        self.values[name] = value


def make_state(**changes):
    fixed = {
        "recipe": None,
        "steps": 10,
        "rank": 0,
        "world_size": 1,
        "device": torch.device("cpu"),
        "vocabulary": Vocabulary(size=40, special_ids=(0, 1, 2, 3, 4), bos_id=1, eos_id=2, mask=4),
        "mixture": None,
        "model": None,
    }
    return State(**(fixed | changes))


class Recorder(Algorithm):
    """Writes into a shared diary whenever one of its events comes."""

    def __init__(self, diary, sign, events=tuple(Event)):
        self.diary, self.sign, self.events, self.kept = diary, sign, events, 0

    def match(self, event, state):
        return event in self.events

    def apply(self, event, state, logger):
        self.diary.append(self.sign)
        self.kept += 1
        logger.log(f"{self.sign}/count", self.kept)

    def state_dict(self):
        return {"kept": self.kept}

    def load_state_dict(self, state_dict):
        self.kept = state_dict["kept"]


def test_there_are_twelve_events_and_the_map_names_each_in_order():
    assert len(Event) == 12
    named = re.findall(r"# ([A-Z]+(?:_[A-Z]+)+|INIT)\b", inspect.getdoc(Event))
    assert named == [event.name for event in Event]


@pytest.mark.parametrize("event", list(Event))
def test_recipe_order_reversed_after(event):
    diary, log = [], Log()
    algorithms = [Recorder(diary, sign) for sign in "abc"]
    Dispatcher(algorithms, logger=log).dispatch(event, make_state())
    after = event in (Event.AFTER_FORWARD, Event.AFTER_LOSS, Event.AFTER_BACKWARD)
    assert diary == list("cba" if after else "abc")
    assert log.values == {"a/count": 1, "b/count": 1, "c/count": 1}


def test_algorithms_see_what_those_before_them_changed():
    class Doubler(Recorder):
        def apply(self, event, state, logger):
            state.learning_rate *= 2

        def match(self, event, state):
            return event is Event.STEP_START and state.learning_rate < 3

    state = make_state()
    state.learning_rate = 1.0
    dispatcher = Dispatcher([Doubler([], "a") for _ in range(3)], logger=Log())
    dispatcher.dispatch(Event.STEP_START, state)
    # The third one no longer matches.
    assert state.learning_rate == 4.0


def test_an_error_names_algorithm_event_and_step():
    class Broken(Recorder):
        def apply(self, event, state, logger):
            raise KeyError("scale")

    dispatcher = Dispatcher([Broken([], "a")], logger=Log())
    with pytest.raises(AlgorithmError) as caught:
        dispatcher.dispatch(Event.AFTER_LOSS, make_state(step=3))
    assert str(caught.value) == "Broken failed at AFTER_LOSS of step 3: KeyError: 'scale'"
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("error", [UserError("x", "bad"), KeyboardInterrupt()])
def test_the_users_own_errors_and_ctrl_c_pass_through(error):
    class Failing(Recorder):
        def apply(self, event, state, logger):
            raise error

    with pytest.raises(type(error)) as caught:
        Dispatcher([Failing([], "a")], logger=Log()).dispatch(Event.FIT_START, make_state())
    assert caught.value is error


def test_algorithms_are_resumed_each_with_its_own_state():
    algorithms = [Recorder([], "a"), Recorder([], "b", (Event.INIT,))]
    saved = Dispatcher(algorithms, logger=Log())
    saved.dispatch(Event.INIT, make_state())
    saved.dispatch(Event.FIT_START, make_state())
    fresh = Dispatcher([Recorder([], "a"), Recorder([], "b")], logger=Log())
    fresh.load_state_dict(saved.state_dict())
    assert [algorithm.kept for algorithm in fresh.algorithms] == [2, 1]


def test_resuming_with_other_algorithms_is_refused():
    saved = Dispatcher([Recorder([], "a")], logger=Log()).state_dict()
    with pytest.raises(UserError) as caught:
        Dispatcher([Recorder([], "a"), Recorder([], "b")], logger=Log()).load_state_dict(saved)
    assert "Recorder, Recorder#2, but the checkpoint was made with Recorder" in str(caught.value)


def test_an_algorithm_that_keeps_nothing_need_not_say_so():
    class Plain(Algorithm):
        def match(self, event, state):
            return False

        def apply(self, event, state, logger):
            return None

    dispatcher = Dispatcher([Plain()], logger=Log())
    assert dispatcher.state_dict() == {"Plain": {}}
    dispatcher.load_state_dict({"Plain": {}})
    with pytest.raises(ValueError, match="Plain keeps kept, but loads nothing"):
        dispatcher.load_state_dict({"Plain": {"kept": 1}})


def test_checkpoints_name_algorithms_that_the_loop_has_taken_over():
    fresh = Dispatcher([Recorder([], "a")], logger=Log())
    fresh.load_state_dict({"AlphaSchedule": {}, "LearningRate": {}, "Recorder": {"kept": 3}})
    assert fresh.algorithms[0].kept == 3
