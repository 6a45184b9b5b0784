"""Text from a model: autoregressive, behind a bidirectional prompt, and by unmasking."""

from __future__ import annotations

from dualtrain.generate.autoregressive import Continuation, Stop, continue_prompts
from dualtrain.generate.choose import Sampling
from dualtrain.generate.decode import Piece, TextStream, label_pieces
from dualtrain.generate.diffusion import Filled, Order, fill_masks
from dualtrain.generate.prompts import encode_prompt, has_gap, parse_gaps
from dualtrain.generate.settings import Mode, Settings
from dualtrain.generate.text_model import TextModel
from dualtrain.generate.texts import Job, Prompt, Text, Watcher, generate_texts, prepare

__all__ = [
    "Continuation",
    "Filled",
    "Job",
    "Mode",
    "Order",
    "Piece",
    "Prompt",
    "Sampling",
    "Settings",
    "Stop",
    "Text",
    "TextModel",
    "TextStream",
    "Watcher",
    "continue_prompts",
    "encode_prompt",
    "fill_masks",
    "generate_texts",
    "has_gap",
    "label_pieces",
    "parse_gaps",
    "prepare",
]
