"""What the README's numbers come from. Each module prints a table and writes JSON to benchmarks/results/."""
