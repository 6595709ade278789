"""GGUF file to logits, a layer at a time, with attention as a parameter.

Start with `gguf_file` (what a file holds), `architectures` (how a layer computes) and `runner` (windows and
arms through all layers).
"""
