"""CUDA sources of the two custom operators, and the arithmetic of their launches."""
