"""Cached keys and values as compressed blocks: one codec, and the components that methods choose from.

Read codec.py first. What a block looks like in memory is in trimtab.kernels.kv_attention.run.
"""

from __future__ import annotations
