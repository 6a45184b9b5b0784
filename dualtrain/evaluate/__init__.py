"""Evaluation: held-out losses of both objectives."""

from dualtrain.evaluate.heldout import HeldOut, held_out_losses
from dualtrain.evaluate.mode import inference

__all__ = ["HeldOut", "held_out_losses", "inference"]
