"""What a trained bridge can do, in numbers and in maps.

It imports the paper's files, `data`, `weights` and `training`.
"""
