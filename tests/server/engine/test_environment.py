"""What an engine process inherits, and what it is given besides."""

import os

from bitwatt.engine.environment import engine_environment


def test_openmp_s_threads_do_not_spin_beside_the_kernels_own() -> None:
    environment = engine_environment({"HOME": "/"})
    assert environment["GOMP_SPINCOUNT"].isdecimal()
    assert environment["OMP_WAIT_POLICY"] == "passive"
    assert environment["HOME"] == "/"


def test_a_policy_the_user_has_set_stands_alone() -> None:
    assert engine_environment({"OMP_WAIT_POLICY": "active"}) == {"OMP_WAIT_POLICY": "active"}
    assert engine_environment({"GOMP_SPINCOUNT": "1"}) == {"GOMP_SPINCOUNT": "1"}


def test_this_process_s_variables_are_inherited() -> None:
    assert os.environ.items() <= engine_environment().items()
