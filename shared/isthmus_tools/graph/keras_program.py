"""A process that writes a Keras file as ONNX: `python -m isthmus_tools.graph.keras_program MODEL.keras OUT.onnx`.

Keras's safe mode refuses lambda layers, which would be executed.
"""

import sys

import keras

if __name__ == "__main__":
    model = keras.saving.load_model(sys.argv[1], compile=False, safe_mode=True)
    # Keras exports a model that was called once.
    zeros = [keras.ops.zeros([n or 1 for n in each.shape], each.dtype) for each in model.inputs]
    model(zeros[0] if len(zeros) == 1 else zeros)
    model.export(sys.argv[2], format="onnx", verbose=False)
