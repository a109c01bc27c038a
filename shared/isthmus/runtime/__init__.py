"""Running a segment: onnxruntime sessions and the store of loaded segments."""
