"""Acceptance rules: which branch of a draft becomes text, and which token follows it."""
