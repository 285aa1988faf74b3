"""Codecs: flat fp32 vectors to bytes and back. Pure; the wire puts the bytes into messages.

`sizes` imports no torch, so the cost model can ask it; the rest is imported where it is needed.
"""
