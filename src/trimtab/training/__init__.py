"""Training: the reference models and, later, objectives, optimisers and data programs."""
