"""Other people's files in, ours out: names, checkpoints, the model hub's folders.

It imports the paper's files and `data`.
"""
