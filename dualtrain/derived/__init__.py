"""What follows from a recipe: steps, tokens, passes, costs, and the dry run that shows them."""
