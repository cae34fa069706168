"""Keys back to where they were before rotary embedding."""

from __future__ import annotations

from trimtab.kernels.kv_attention.run import Rope


def inverse_rope(rope: Rope) -> Rope:
    """The table with which `rotary` undoes what it does with `rope`, to rounding.

    A rotation by minus the angle; the scaling of attention that cos and sin may hold (YaRN) is divided out, which is
    a division by cos^2 + sin^2.
    """
    size = rope.cos.square() + rope.sin.square()
    return Rope(cos=rope.cos / size, sin=-rope.sin / size)
