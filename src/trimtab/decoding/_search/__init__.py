"""Searches: texts that are written piece by piece, the better ones going on."""
