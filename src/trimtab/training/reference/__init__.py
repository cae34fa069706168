"""How the shipped reference models ``ref`` and ``ref-mini`` are made.

``python -m trimtab.training.reference --text DIR --out DIR`` trains them again from a folder of
plain-text books.
"""
