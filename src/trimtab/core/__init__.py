"""Floor 0: what every room stands on. Imports nothing else of trimtab, and no torch."""
