"""placeholder while the rest is written"""
EXAMPLES = ("trimtab compress",)
def run() -> None:
    """compress"""
