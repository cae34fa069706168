"""Floor 0: operations with a plain reference, fast paths beside it, and a dispatch that explains itself.

Read op.py for the pattern, grid_matmul/ for the first operation, packing.py for the stored layout it runs on.
"""
