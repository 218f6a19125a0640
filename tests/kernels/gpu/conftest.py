"""Triton is on Linux and x86-64 only; elsewhere there is nothing to test here."""

from importlib.util import find_spec

collect_ignore_glob = ["*"] if find_spec("triton") is None else []
