"""What came out of runs: tables and pictures."""
