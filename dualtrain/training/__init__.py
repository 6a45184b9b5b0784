"""A run from its recipe to its last step: start, assembly, the loop, what it evaluates."""
