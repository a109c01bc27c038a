"""The Open Inference Protocol: requests and responses as documents and tensors; no I/O."""
