"""What tests of the scorecard share: many tries of a row in one test, and how busy the machine was meanwhile."""
import os


def busy():
    """The load, for figures of time: processes that wanted a core in the last minute."""
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


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
