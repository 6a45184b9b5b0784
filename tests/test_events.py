"""Who is called when, in which order, and what happens when one of them fails."""

import inspect
import re
from types import SimpleNamespace

import pytest
import torch

from dualtrain.errors import UserError
from dualtrain.events import (
    Algorithm,
    AlgorithmError,
    Callback,
    Dispatcher,
    Event,
    State,
    Vocabulary,
)


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
        "vocabulary": Vocabulary(40, 4, (0, 1, 2, 3, 4)),
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


class Watcher(Callback):
    def __init__(self, action):
        self.action = action

    def match(self, event, state):
        return True

    def observe(self, event, state):
        self.action(event, state)


def test_there_are_twelve_events_and_the_map_names_each_in_order():
    assert len(Event) == 12
    named = re.findall(r"# ([A-Z]+(?:_[A-Z]+)+|INIT)\b", inspect.getdoc(Event))
    assert named == [event.name for event in Event]


@pytest.mark.parametrize("event", list(Event))
def test_recipe_order_reversed_after_and_callbacks_last(event):
    diary, log = [], Log()
    watcher = Watcher(lambda event, state: diary.append("callback"))
    algorithms = [Recorder(diary, sign) for sign in "abc"]
    Dispatcher(algorithms, [watcher], logger=log).dispatch(event, make_state())
    after = event in (Event.AFTER_FORWARD, Event.AFTER_LOSS, Event.AFTER_BACKWARD)
    assert diary == [*("cba" if after else "abc"), "callback"]
    assert log.values == {"a/count": 1, "b/count": 1, "c/count": 1}


def test_algorithms_see_what_those_before_them_changed():
    class Doubler(Recorder):
        def apply(self, event, state, logger):
            state.learning_rate *= 2

        def match(self, event, state):
            return event is Event.STEP_START and state.learning_rate < 3

    state = make_state(learning_rate=1.0)
    dispatcher = Dispatcher([Doubler([], "a") for _ in range(3)], logger=Log())
    dispatcher.dispatch(Event.STEP_START, state)
    # The third one no longer matches.
    assert state.learning_rate == 4.0 and len(dispatcher.traces()) == 2


def test_callbacks_see_the_state_but_cannot_change_it():
    seen = []
    state = make_state(learning_rate=0.5)
    Dispatcher(
        [], [Watcher(lambda event, state: seen.append(state.learning_rate))], logger=Log()
    ).dispatch(Event.STEP_END, state)
    assert seen == [0.5]

    def meddle(event, state):
        state.learning_rate = 1.0

    with pytest.raises(AlgorithmError, match=r"must not change the state \(learning_rate\)"):
        Dispatcher([], [Watcher(meddle)], logger=Log()).dispatch(Event.STEP_END, state)
    assert state.learning_rate == 0.5


def test_traces_tell_who_ran_when_and_forget_the_oldest():
    first = Recorder([], "a", (Event.STEP_START, Event.AFTER_LOSS))
    second = Recorder([], "b", (Event.AFTER_LOSS,))
    dispatcher = Dispatcher([first, second], logger=Log(), traces=3)
    state = make_state(step=7, slot=SimpleNamespace(index=2))
    for event in (Event.STEP_START, Event.STEP_START, Event.AFTER_LOSS, Event.STEP_END):
        dispatcher.dispatch(event, state)
    assert [str(trace) for trace in dispatcher.traces()] == [
        "step 7: STEP_START Recorder",
        "step 7 slot 2: AFTER_LOSS Recorder#2",
        "step 7 slot 2: AFTER_LOSS Recorder",
    ]


def test_an_error_names_algorithm_event_and_step():
    class Broken(Recorder):
        def apply(self, event, state, logger):
            raise KeyError("scale")

    dispatcher = Dispatcher([Broken([], "a")], logger=Log())
    with pytest.raises(AlgorithmError) as caught:
        dispatcher.dispatch(Event.AFTER_LOSS, make_state(step=3))
    assert str(caught.value) == "Broken failed at AFTER_LOSS of step 3: KeyError: 'scale'"
    assert isinstance(caught.value.__cause__, KeyError)
    # The trace of the failing call is there to be printed.
    assert dispatcher.traces()[-1].name == "Broken"


@pytest.mark.parametrize("error", [UserError("x", "bad"), KeyboardInterrupt()])
def test_the_users_own_errors_and_ctrl_c_pass_through(error):
    def fail(event, state):
        raise error

    with pytest.raises(type(error)) as caught:
        Dispatcher([], [Watcher(fail)], logger=Log()).dispatch(Event.FIT_START, make_state())
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


def test_an_algorithm_must_say_what_it_keeps():
    class Forgetful(Algorithm):
        def match(self, event, state):
            return False

        def apply(self, event, state, logger):
            return None

    with pytest.raises(TypeError, match="load_state_dict"):
        Forgetful()
