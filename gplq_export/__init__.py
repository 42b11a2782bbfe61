"""From a quantised checkpoint to ONNX files and TensorRT engines, each proven against PyTorch."""
