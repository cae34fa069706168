"""placeholder while the rest is written"""

EXAMPLES = ("trimtab evaluate",)


def run() -> None:
    """evaluate"""
