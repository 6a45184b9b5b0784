"""Algorithms: what changes the training, at which of the loop's twelve moments."""

from dualtrain.algorithms.events import Algorithm, Event, Logger, State

__all__ = ["Algorithm", "Event", "Logger", "State"]
