"""Text from a model: autoregressive, behind a bidirectional prompt, and by unmasking."""
