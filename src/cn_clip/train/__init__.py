"""Training: recipes, stages, losses and the loop that runs them."""
