"""Evaluation: held-out losses and zero-shot tasks, in every mode of a dual model."""
