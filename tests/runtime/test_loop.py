"""The loop over every combination of an engine's graphs, made up in NumPy."""

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from restyle_deploy.runtime.session import Session
from tests.fakes import PREVIEW_ERROR, Buffers, create_engine_session, expected_latents

ROLES = [(), ("target",), ("preview",), ("target", "preview")]
combinations = pytest.mark.parametrize("roles", ROLES, ids=lambda roles: "+".join(roles) or "none")
batches = pytest.mark.parametrize("batch", [None, 1], ids=["any batch", "batch of one"])


def targets_of(session: Session, count: int, seed: int = 0) -> NDArray[np.float32]:
    shape = (count, 3, *session.config.input_shape)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def assert_is(found: NDArray[np.float32], values: NDArray[np.float64]) -> None:
    """Check that each [..., n, m] of `found` is filled with its value."""
    filled = np.broadcast_to(values.reshape(values.shape + (1,) * (found.ndim - values.ndim)), found.shape)
    np.testing.assert_allclose(found, filled, rtol=0, atol=1e-5)


@combinations
@batches
@pytest.mark.parametrize("domain", ["faces", "cars"])
@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_every_combination_computes_the_loop(
    roles: tuple[str, ...], batch: int | None, domain: str, steps: int
) -> None:
    session, _ = create_engine_session(roles=roles, batch=batch, domain=domain)
    for seed, count in enumerate((3, 1, 3)):
        targets = targets_of(session, count, seed)
        expected = expected_latents(targets, steps, preview_error=PREVIEW_ERROR if "preview" in roles else 0.0)[-1]
        result = session.invert(targets, steps=steps)
        assert_is(result.latents, expected)
        assert_is(result.images, expected / 2)  # the last image is no preview


@pytest.mark.parametrize("roles", [(), ("target",)], ids=["none", "target"])
@batches
def test_every_step_is_kept_where_it_has_an_image(roles: tuple[str, ...], batch: int | None) -> None:
    session, _ = create_engine_session(roles=roles, batch=batch)
    targets = targets_of(session, 3)
    expected = expected_latents(targets, 4)
    result = session.invert(targets, steps=4, every_step=True)
    assert_is(result.latents, expected)
    assert_is(result.images, expected / 2)


@pytest.mark.parametrize("roles", [("preview",), ("target", "preview")], ids="+".join)
def test_every_step_is_refused_where_steps_have_no_image(roles: tuple[str, ...]) -> None:
    session, runners = create_engine_session(roles=roles)
    with pytest.raises(ValueError, match="every_step: with preview_steps only the last step has an image"):
        session.invert(targets_of(session, 1), steps=1, every_step=True)
    assert not any(runner.ran for runner in runners.values())


@combinations
@batches
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_each_graph_runs_as_often_as_it_has_to(roles: tuple[str, ...], batch: int | None, steps: int) -> None:
    session, runners = create_engine_session(roles=roles, batch=batch)
    session.invert(targets_of(session, 3), steps=steps)
    runs = {role: len(runner.ran) // (3 if batch else 1) for role, runner in runners.items()}
    expected = {"encoder": steps, "generator": steps}
    if "target" in roles:
        expected["target"] = 1
    if "preview" in roles:
        expected |= {"preview": steps - 1, "generator": 1}
    assert runs == expected


@combinations
def test_graphs_are_bound_once_and_only_to_what_they_name(roles: tuple[str, ...]) -> None:
    session, runners = create_engine_session(roles=roles)
    for seed in range(3):
        session.invert(targets_of(session, 2, seed), steps=6)
    seen = "target_features" if "target" in roles else "target"
    names = {
        "encoder": {seen, "current", "latent", "latent_out"},
        "generator": {"latent", "image", "current"},
        "target": {"target", "target_features"},
        "preview": {"latent", "current"},
    }
    for role, runner in runners.items():
        assert len(runner.bound) == (1 if role == "target" else 2), role
        assert {frozenset(buffers) for buffers in runner.bound} == {frozenset(names[role])}, role


@combinations
def test_graphs_for_one_image_get_neighbouring_parts_of_the_same_buffers(roles: tuple[str, ...]) -> None:
    session, runners = create_engine_session(roles=roles, batch=1)
    session.invert(targets_of(session, 3), steps=2)
    for role, runner in runners.items():
        for buffers in zip(*[iter(runner.bound)] * 3, strict=True):
            for name in buffers[0]:
                parts = [part[name] for part in buffers]
                assert all(part.shape[0] == 1 and part.flags.c_contiguous for part in parts), (role, name)
                starts = [part.ctypes.data for part in parts]
                assert np.diff(starts).tolist() == [parts[0].nbytes] * 2, (role, name)


def test_preview_and_last_image_share_what_the_encoder_reads() -> None:
    session, runners = create_engine_session(roles=("target", "preview"))
    session.invert(targets_of(session, 2), steps=5)
    encoder, generator, preview, target = (runners[name].ran for name in ("encoder", "generator", "preview", "target"))
    assert len({run["current"] for run in (*encoder, *generator, *preview)}) == 1
    assert {run["target_features"] for run in encoder} == {target[0]["target_features"]}
    for step, run in enumerate((*preview, *generator)):
        assert run["latent"] == encoder[step]["latent_out"]


@combinations
@batches
def test_loop_allocates_nothing_per_step(roles: tuple[str, ...], batch: int | None) -> None:
    session, runners = create_engine_session(roles=roles, batch=batch)
    traced: list[tuple[int, int]] = []

    def note(_: Buffers) -> None:
        traced.append(tracemalloc.get_traced_memory())
        tracemalloc.reset_peak()

    compute: Callable[[Buffers], None] = note
    for runner in runners.values():
        runner.compute = compute
    targets = targets_of(session, 4)
    tracemalloc.start()
    try:
        session.invert(targets, steps=50)
    finally:
        tracemalloc.stop()
    per_run = 4 if batch else 1
    assert len(traced) == per_run * (100 + ("target" in roles))
    largest = max(after[1] - before[0] for before, after in zip(traced, traced[1:], strict=False))
    assert largest < 2048  # what there is are the lists of this test


@combinations
def test_closing_releases_every_graph(roles: tuple[str, ...]) -> None:
    session, runners = create_engine_session(roles=roles)
    with session:
        session.invert(targets_of(session, 1), steps=2)
    session.close()
    assert {role: runner.closed for role, runner in runners.items()} == dict.fromkeys(runners, 1)


@pytest.mark.parametrize(
    ("roles", "approximate"),
    [((), False), (("target",), False), (("preview",), True)],
    ids=["none", "target", "preview"],
)
def test_previews_are_approximate(roles: tuple[str, ...], approximate: bool) -> None:
    session, _ = create_engine_session(roles=roles)
    assert session.is_approximate is approximate
