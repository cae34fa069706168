"""placeholder while the rest is written"""

EXAMPLES = ("trimtab compare",)


def run() -> None:
    """compare"""
