"""placeholder while the rest is written"""

EXAMPLES = ("trimtab demo",)


def run() -> None:
    """demo"""
