"""placeholder while the rest is written"""
EXAMPLES = ()
def run() -> None:
    """compress"""
