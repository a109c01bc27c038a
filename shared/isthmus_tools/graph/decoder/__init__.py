"""Decoder language models as ONNX graphs with declared state, read from GGUF or from transformers' folders."""
