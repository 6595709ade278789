"""GGUF files: header, tensors and what their types stand for."""
