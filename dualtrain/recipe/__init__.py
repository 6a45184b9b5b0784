"""Recipes: every setting of a run in one YAML file, checked as a whole before anything starts."""
