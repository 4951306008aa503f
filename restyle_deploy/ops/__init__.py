"""The two custom operators: torch reference and ONNX local function, one file each."""
