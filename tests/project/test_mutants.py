"""Every mutant of :mod:`mutants` is killed by the tests it names."""

import ast
import random

import mutants
import pytest
import random_mutants


def test_every_mutant_applies():
    """To the code as it is."""
    for mutant in mutants.MUTANTS:
        mutants.mutated(mutant, mutants.PACKAGE)


def test_random_mutants_are_programs_that_differ():
    """Every kind of change is there, and none is a mistake of the script."""
    found = random_mutants.candidates()
    for mutant, lines in random.Random(0).sample(found, 20):
        assert ast.dump(ast.parse(mutant.new)) != ast.dump(ast.parse(mutant.old)), mutant.name
        assert mutant.name.startswith(f"{mutant.file}:{lines[0]} ")
    for kind in ("without its last term", "without its sign", "arguments swapped", " as ", ":", "without "):
        assert any(kind in mutant.name for mutant, _ in found), kind


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_mutant_is_killed():
    assert mutants.main([]) == 0
