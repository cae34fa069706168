"""Floor 1: draft, verify and choose tokens, exactly. Read base.py first."""
