"""Every mutant of :mod:`mutants` is killed by the tests it names."""

import mutants
import pytest


def test_every_mutant_applies():
    """To the code as it is."""
    for mutant in mutants.MUTANTS:
        mutants.mutated(mutant, mutants.PACKAGE)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_mutant_is_killed():
    assert mutants.main([]) == 0
