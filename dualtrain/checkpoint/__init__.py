"""Checkpoints: written whole, found, checked, continued from, and opened as a model."""
