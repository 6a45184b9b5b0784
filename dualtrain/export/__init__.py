"""Exports: a trained model as a directory that transformers and other tools open."""

from dualtrain.export.command import Exported, export_checkpoint

__all__ = ["Exported", "export_checkpoint"]
