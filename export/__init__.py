"""What leaves: TorchScript, ONNX, the proof that they agree, and the archive for TorchServe."""
