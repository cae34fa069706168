"""Decide with the metric: what a model believes of an answer, as weighted values, and the best act for each metric."""
