"""Bridges that ship with the module: weights in half precision, a log to four digits and the results of a run each.

No code stands here and nothing is imported; `training.shipping` writes these folders and finds them.
"""
