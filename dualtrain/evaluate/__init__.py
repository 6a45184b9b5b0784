"""Evaluation: held-out losses and zero-shot tasks, in every mode of a dual model."""

from dualtrain.evaluate.heldout import HeldOut, held_out_losses
from dualtrain.evaluate.mode import inference

__all__ = ["HeldOut", "held_out_losses", "inference"]
