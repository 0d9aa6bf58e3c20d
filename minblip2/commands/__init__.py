"""What the command line does: a file for each command, and the options that they share.

It may import all rooms. A file has `add`, which tells the grammar, and `run`, which does the work.
"""
