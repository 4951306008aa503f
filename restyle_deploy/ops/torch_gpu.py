"""Why torch cannot use a GPU: there may be one, and a torch that was built without CUDA."""

import torch


def why_torch_sees_no_gpu() -> str:
    """Return the reason, with the version of torch; empty where it sees one."""
    if torch.cuda.is_available():
        return ""
    built_for = "CPU build" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
    return f"torch {torch.__version__} ({built_for}) sees no GPU"
