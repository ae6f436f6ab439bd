"""int8 ranges from a float ONNX and images; knows no torch and no checkpoint. Imported as `edge_ilseg.calibration`."""
