"""The paper's benchmarks as `engine.task.Benchmark`s: one file a benchmark, plus where raw images come from."""
