"""The reference model on our operators: on the CPU, where these are the reference themselves."""

from typing import Any

import pytest
import torch

from restyle_deploy.ops import cuda_ops, fused_bias_act, upfirdn2d
from tests.toy import toy_model

CALLS = ("fused_bias_act", "upfirdn2d", "upfirdn2d_epilogue")


@pytest.fixture
def switched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let CPU tensors count as CUDA tensors inside the switch; return the names of the operators that were called."""
    called: list[str] = []

    def recorded(name: str) -> Any:
        operator = getattr(cuda_ops, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            with monkeypatch.context() as context:  # the operator's CPU implementation is the reference
                context.setattr(fused_bias_act, "active_kernels", lambda x: None)
                context.setattr(upfirdn2d, "active_kernels", lambda x: None)
                return operator(*args, **kwargs)

        return run

    kernels = type("Kernels", (), {name: staticmethod(recorded(name)) for name in CALLS})
    for module in (fused_bias_act, upfirdn2d):
        monkeypatch.setattr(module, "active_kernels", lambda x: kernels)
    return called


def test_the_model_computes_the_same_by_our_operators(switched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy_model().eval()
    latent = torch.randn((2, *model.latent_avg.shape), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model.decoder(latent)
        names = set(switched)
        monkeypatch.undo()
        expected = model.decoder(latent)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert names == {"fused_bias_act", "upfirdn2d"}


def test_every_argument_is_passed_on(switched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All differ from their defaults, so that a lost one changes the result."""
    generator = torch.Generator().manual_seed(2)
    x, kernel = torch.randn((2, 3, 5, 6), generator=generator), torch.randn((3, 3), generator=generator)
    factors: dict[str, Any] = {
        "bias": torch.randn(3, generator=generator),
        "demod": torch.randn((2, 3), generator=generator),
        "noise": torch.randn((1, 1, 5, 6), generator=generator),
        "next_scale": torch.randn((2, 3), generator=generator),
        "noise_strength": 0.7,
        "negative_slope": 0.3,
        "gain": 1.3,
    }
    larger = {**factors, "noise": torch.randn((1, 1, 6, 7), generator=generator)}
    window: dict[str, Any] = {"up": 2, "down": 2, "pads": (1, 2, 2, 1)}

    def run() -> list[torch.Tensor]:
        return [
            fused_bias_act.fused_bias_act(x, **factors),
            upfirdn2d.upfirdn2d(x, kernel, **window),
            upfirdn2d.upfirdn2d_epilogue(x, kernel, **window, **larger),
        ]

    ours = run()
    assert switched == list(CALLS)
    monkeypatch.undo()
    for ours_one, expected in zip(ours, run(), strict=True):
        torch.testing.assert_close(ours_one, expected, rtol=1e-5, atol=1e-5)
