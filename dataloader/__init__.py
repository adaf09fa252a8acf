"""The paper's benchmarks as `gpm.task.Benchmark`s: one file a benchmark, plus where raw images come from."""
