"""Bundle -> fixed-step loop; imports neither torch nor onnx."""
