"""The device half: runtimes and verification, without torch and onnx. Imported as `edge_ilseg.devices`."""
