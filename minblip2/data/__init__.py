"""From files to batches: drawn scenes and COCO folders, pixels, tokens, cached features.

It imports the paper's files only.
"""
