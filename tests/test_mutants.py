"""Every mutant of :mod:`mutants` is killed by the tests it names."""

import mutants
import pytest


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_mutant_is_killed():
    assert mutants.main([]) == 0
