"""The kernels' part of `make gpu`; server/bitwatt/bench/gpu.py runs it, and whole models."""
