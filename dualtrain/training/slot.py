"""A slot: from its clean sequences to its loss, by way of the algorithms and the model."""

from __future__ import annotations

from dualtrain.algorithms.events import Dispatcher, Event, State
from dualtrain.model.handle import ModelHandle
from dualtrain.network.attention import plan_attention, to_device
from dualtrain.network.loss import select_positions
from dualtrain.network.output import DualOutput


def slot_loss(state: State, dispatcher: Dispatcher, model: ModelHandle) -> None:
    """From the clean sequences of the state's slot to its loss."""
    dispatcher.dispatch(Event.BATCH_START, state)
    dispatcher.dispatch(Event.BEFORE_FORWARD, state)
    state.output = forward(state, model)
    dispatcher.dispatch(Event.AFTER_FORWARD, state)
    assert state.output.loss is not None  # there are targets
    state.loss = state.output.loss * state.slot.loss_scale
    dispatcher.dispatch(Event.AFTER_LOSS, state)


def forward(state: State, model: ModelHandle) -> DualOutput:
    """Give the state's example to the model, under the attention of its objective."""
    example = state.example
    attention = plan_attention(
        example.attention,
        example.document_ids,
        backend=model.backend,
        device=model.device,
        dtype=model.dtype,
    )
    # Chosen before the weights leave the CPU, so that the head runs only where there is a loss.
    selection = select_positions(example.weights)
    moved = example.to(model.device)
    return state.engine(
        moved.input_ids,
        attention=attention,
        targets=moved.targets,
        weights=moved.weights,
        z_loss=state.recipe.objective.z_loss,
        selection=None if selection is None else to_device(selection, model.device),
    )
