"""Clean-up passes over an ONNX graph, one a file. cleanup.py runs them; base.py says what a pass is."""
