"""Tokenizers: trained, found, and fast where the result is the same."""
