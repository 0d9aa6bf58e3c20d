"""What the notebooks draw and say with.

Only notebooks, exercises, benchmarks and the command line import it.
"""
