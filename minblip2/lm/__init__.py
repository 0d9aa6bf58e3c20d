"""The frozen language models, decoder-only and encoder-decoder, behind one protocol.

Part of the paper: it imports only the paper's files, those at the top of `minblip2`.
"""
