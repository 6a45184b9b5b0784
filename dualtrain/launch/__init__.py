"""Ranks: starting them, on one machine or many; signals; peers that are lost."""
