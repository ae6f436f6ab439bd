"""From a step to a bundle: float ONNX, int8, OpenVINO IR, parity. Imported as `edge_ilseg.export`."""
