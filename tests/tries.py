"""What tests of the scorecard share: one try of a row, and many of them with the names of those that failed."""
import contextlib


@contextlib.contextmanager
def trying(score):
    """One try of a row: the block asserts what must hold."""
    held = 0
    try:
        yield
        held = 1
    finally:
        score(held, 1)


def tries(score, cases, attempt, figures=""):
    """Call attempt(case) for each of {name: case}, then score; AssertionError with the first tries that failed."""
    failed = {}
    for name, case in cases.items():
        try:
            attempt(case)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"[:300]
    score(len(cases) - len(failed), len(cases), figures)
    assert not failed, list(failed.items())[:5]
