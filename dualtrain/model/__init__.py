"""Models one can call: built from a recipe, imported from Hugging Face, exported."""
