"""What `make gpu` runs: benchmarks of the kernels and of whole models on one GPU."""
