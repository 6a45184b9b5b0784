"""Exports: a trained model as a directory that transformers and other tools open."""
