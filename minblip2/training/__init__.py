"""One loop for everything that learns, the recipes, and the bridge that they make.

It imports the paper's files, `data` and `weights`.
"""
