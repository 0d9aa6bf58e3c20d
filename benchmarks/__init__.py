"""Measurements that anyone can repeat; results are written under runs/benchmarks/."""
