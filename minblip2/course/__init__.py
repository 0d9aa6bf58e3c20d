"""What the notebooks draw and say with, and the commands that run them and write the README's tables.

Only notebooks, exercises, benchmarks and the command line import it.
"""
