"""The fixed-step loop: on graphs made up in NumPy where its inner life matters, else on the toy bundle."""

import re
import tracemalloc
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from restyle_deploy import InversionResult, Session
from restyle_deploy.errors import BackendUnavailableError, BundleError, ShapeError, VerificationError
from restyle_deploy.runtime import host_device
from restyle_deploy.runtime.images import normalize_images, resize_image
from restyle_deploy.runtime.loop_cache import HOST_BATCHES_KEPT
from restyle_deploy.runtime.session import LARGEST_VALUE
from tests.fakes import create_session, encode, expected_latents, generate
from tests.pictures import picture

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def session(toy_bundle: Path) -> Iterator[Session]:
    """The toy bundle on the CPU."""
    with Session.open(toy_bundle, threads=1) as session:
        yield session


def pictures(count: int) -> NDArray[np.uint8]:
    return np.stack([picture(seed) for seed in range(count)])


def targets_of(session: Session, count: int, seed: int = 0) -> NDArray[np.float32]:
    shape = (count, 3, *session.config.input_shape)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def assert_close(found: InversionResult, expected: InversionResult) -> None:
    np.testing.assert_allclose(found.latents, expected.latents, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(found.images, expected.images, rtol=0, atol=TOLERANCE)


# What comes out


def test_results_have_the_models_sizes(session: Session) -> None:
    config = session.config
    latent, image = (config.n_styles, config.style_dim), (3, *config.image_shape)
    last = session.invert(pictures(2), steps=3)
    assert (last.latents.shape, last.images.shape) == ((2, *latent), (2, *image))
    every = session.invert(pictures(2), steps=3, every_step=True)
    assert (every.latents.shape, every.images.shape) == ((3, 2, *latent), (3, 2, *image))
    for array in (last.latents, last.images, every.latents, every.images):
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
        assert array.flags.writeable


def test_five_steps_unless_told(session: Session) -> None:
    np.testing.assert_array_equal(session.invert(pictures(1)).latents, session.invert(pictures(1), steps=5).latents)


@pytest.mark.parametrize("domain", ["faces", "cars"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 10])
def test_loop_is_the_papers(domain: str, steps: int) -> None:
    session, _, _ = create_session(domain=domain)
    targets = targets_of(session, 3)
    expected = expected_latents(targets, steps)  # [steps, N]
    every = session.invert(targets, steps=steps, every_step=True)
    last = session.invert(targets, steps=steps)
    latents, images = expected[:, :, None, None], expected[:, :, None, None, None] / 2
    np.testing.assert_allclose(every.latents, np.broadcast_to(latents, every.latents.shape), atol=1e-5)
    np.testing.assert_allclose(every.images, np.broadcast_to(images, every.images.shape), atol=1e-5)
    np.testing.assert_array_equal(last.latents, every.latents[-1])
    np.testing.assert_array_equal(last.images, every.images[-1])


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_every_step_equals_inversions_of_so_many_steps(session: Session, steps: int) -> None:
    every = session.invert(pictures(2), steps=4, every_step=True)
    expected = InversionResult(images=every.images[steps - 1], latents=every.latents[steps - 1])
    assert_close(session.invert(pictures(2), steps=steps), expected)
    shorter = session.invert(pictures(2), steps=steps, every_step=True)
    assert_close(shorter, InversionResult(images=every.images[:steps], latents=every.latents[:steps]))


@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize("max_batch", [1, 2, 3])
def test_split_batches_equal_the_whole(session: Session, every_step: bool, max_batch: int) -> None:
    images = pictures(5)
    whole = session.invert(images, steps=3, every_step=every_step)
    assert_close(session.invert(images, steps=3, every_step=every_step, max_batch=max_batch), whole)


def test_images_do_not_depend_on_their_neighbours(session: Session) -> None:
    images = pictures(9)
    whole = session.invert(images, steps=2)
    for index in (0, 4, 8):
        alone = session.invert(images[index : index + 1], steps=2)
        assert_close(alone, InversionResult(images=whole.images[[index]], latents=whole.latents[[index]]))
    assert np.ptp(whole.latents, axis=0).max() > 100 * TOLERANCE


@pytest.mark.parametrize("size", [(40, 50), (200, 16), (1, 1), (32, 32)])
def test_pixels_of_any_size_equal_prepared_ones(session: Session, size: tuple[int, int]) -> None:
    image = picture(3, *size)
    prepared = normalize_images(resize_image(image, session.config.input_shape)[None])
    found, expected = session.invert(image[None], steps=2), session.invert(prepared, steps=2)
    np.testing.assert_array_equal(found.latents, expected.latents)
    np.testing.assert_array_equal(found.images, expected.images)


def test_input_is_only_read(session: Session) -> None:
    for images in (pictures(2), targets_of(session, 2)):
        before = images.copy()
        images.flags.writeable = False
        session.invert(images, steps=2)
        np.testing.assert_array_equal(images, before)


def test_input_may_have_any_layout(session: Session) -> None:
    for images in (pictures(3), targets_of(session, 3)):
        expected = session.invert(images, steps=1)
        for other in (np.asfortranarray(images), np.repeat(images, 2, axis=0)[::2], images[::-1][::-1]):
            np.testing.assert_array_equal(session.invert(other, steps=1).latents, expected.latents)


@pytest.mark.parametrize("every_step", [False, True])
def test_results_belong_to_the_caller(session: Session, every_step: bool) -> None:
    first = session.invert(targets_of(session, 2, seed=1), steps=2, every_step=every_step)
    kept = first.latents.copy(), first.images.copy()
    second = session.invert(targets_of(session, 2, seed=2), steps=2, every_step=every_step)
    assert not np.array_equal(second.latents, first.latents)
    np.testing.assert_array_equal(first.latents, kept[0])
    np.testing.assert_array_equal(first.images, kept[1])
    expected = second.latents.copy()
    second.latents.fill(np.nan)
    second.images.fill(np.nan)
    third = session.invert(targets_of(session, 2, seed=2), steps=2, every_step=every_step)
    np.testing.assert_array_equal(third.latents, expected)


# What happens inside


@pytest.mark.parametrize("every_step", [False, True])
def test_buffers_are_bound_once_and_kept(every_step: bool) -> None:
    session, encoder, generator = create_session()
    session.invert(targets_of(session, 2), steps=6, every_step=every_step)
    bound = len(encoder.bound), len(generator.bound)
    first = encoder.ran[:], generator.ran[:]
    assert bound == ((6, 6) if every_step else (2, 2))
    session.invert(targets_of(session, 2, seed=1), steps=6, every_step=every_step)
    assert (len(encoder.bound), len(generator.bound)) == bound
    assert (encoder.ran, generator.ran) == (first[0] * 2, first[1] * 2)


def test_each_step_writes_where_the_next_one_reads() -> None:
    session, encoder, generator = create_session()
    session.invert(targets_of(session, 2), steps=6)
    assert len(encoder.ran) == len(generator.ran) == 6
    assert len({run["target"] for run in encoder.ran}) == 1
    assert len({run["current"] for run in (*encoder.ran, *generator.ran)}) == 1
    assert len({run["image"] for run in generator.ran}) == 1
    for step in range(6):
        assert generator.ran[step]["latent"] == encoder.ran[step]["latent_out"]
        assert encoder.ran[step] == encoder.ran[step % 2]
        if step > 0:
            assert encoder.ran[step]["latent"] == encoder.ran[step - 1]["latent_out"]


def test_loop_allocates_nothing_per_step() -> None:
    traced: list[tuple[int, int]] = []

    def note(_: Mapping[str, NDArray[Any]]) -> None:
        traced.append(tracemalloc.get_traced_memory())
        tracemalloc.reset_peak()

    session, encoder, generator = create_session(encoder=note, generator=note)
    targets = targets_of(session, 8)
    tracemalloc.start()
    try:
        session.invert(targets, steps=100)
    finally:
        tracemalloc.stop()
    assert len(traced) == 200
    largest = max(after[1] - before[0] for before, after in zip(traced, traced[1:], strict=False))
    smallest_buffer = min(array.nbytes for runner in (encoder, generator) for array in runner.bound[0].values())
    assert largest < 1024 < smallest_buffer  # what there is are the lists of this test


def test_more_steps_need_no_more_memory(session: Session) -> None:
    targets = targets_of(session, 2)
    for steps in (2, 60):
        session.invert(targets, steps=steps)

    def peak_of(steps: int) -> int:
        tracemalloc.start()
        try:
            session.invert(targets, steps=steps)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak_of(60) - peak_of(2) < session.bundle.latent_avg.nbytes


def test_few_loops_are_kept() -> None:
    session, encoder, _ = create_session()
    for count in (*range(1, HOST_BATCHES_KEPT + 3), 1):
        targets = targets_of(session, count)
        found = session.invert(targets, steps=2).latents[:, 0, 0]
        np.testing.assert_allclose(found, expected_latents(targets, 2)[-1], atol=1e-5)
        assert len(session._execution.loops.batches) <= HOST_BATCHES_KEPT
    assert len(encoder.bound) == 2 * (HOST_BATCHES_KEPT + 3)


def test_threads_may_share_a_session(session: Session) -> None:
    targets = [targets_of(session, 1 + seed % 3, seed=seed) for seed in range(12)]
    expected = [session.invert(target, steps=3).latents for target in targets]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda target: session.invert(target, steps=3).latents, targets))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


# Opening and closing


def test_session_describes_itself(toy_bundle: Path) -> None:
    with Session.open(str(toy_bundle), threads=1) as session:
        description = session.describe()
        assert description["library_versions"].keys() == {"onnxruntime"}
        del description["library_versions"]
        assert description == {
            "backend": "onnxruntime",
            "device": "cpu",
            "threads": 1,
            "precision": "fp32",
            "plan": "plain",
            "preview_steps": False,
        }
        description.clear()
        assert session.describe()


def test_closing_twice_is_safe_and_releases_the_graphs() -> None:
    session, encoder, generator = create_session()
    with session as entered:
        assert entered is session
        session.invert(targets_of(session, 1), steps=1)
    session.close()
    assert (encoder.closed, generator.closed) == (1, 1)
    assert not session._execution.loops.batches


def test_closing_gives_the_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[tuple[weakref.ref[NDArray[np.uint8]], int]] = []
    map_memory = host_device._map_memory

    def note(nbytes: int) -> NDArray[np.uint8]:
        memory = map_memory(nbytes)
        blocks.append((weakref.ref(memory), nbytes))
        return memory

    monkeypatch.setattr(host_device, "_map_memory", note)
    session, *runners = create_session()
    session.invert(targets_of(session, 8), steps=2)
    session.invert(targets_of(session, 8), steps=3, every_step=True)
    held = sum(nbytes for memory, nbytes in blocks if memory() is not None)
    image_bytes = 4 * 3 * 64 * 64
    assert held > (8 + 3 * 8) * image_bytes
    session.close()
    for runner in runners:
        runner.bound.clear()
    assert all(memory() is None for memory, _ in blocks)


def test_closed_session_inverts_no_more(toy_bundle: Path) -> None:
    session = Session.open(toy_bundle)
    session.close()
    with pytest.raises(ValueError, match="the session is closed"):
        session.invert(pictures(1))
    assert session.config.output_size == 64


def test_session_is_closed_after_an_error() -> None:
    session, encoder, _ = create_session()
    with pytest.raises(ShapeError), session:
        session.invert(np.zeros((1, 3, 5, 5), np.float32))
    assert encoder.closed == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backend": "abacus"}, ValueError, "unknown backend 'abacus'"),
        ({"threads": 0}, ValueError, "threads is 0, expected at least 1"),
        ({"threads": -1}, ValueError, "threads is -1, expected at least 1"),
        ({"max_batch": 2.5}, TypeError, "max_batch is a float, expected a whole number"),
        ({"device": "abacus"}, BackendUnavailableError, "device 'abacus' cannot run here"),
        ({"precision": "abacus"}, BackendUnavailableError, "precision abacus cannot run here"),
        ({"bundle": "nowhere"}, BundleError, "nowhere: no bundle"),
    ],
)
def test_session_that_cannot_be_opened(
    toy_bundle: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Session.open(**{"bundle": toy_bundle, **arguments})


# What is refused


@pytest.mark.parametrize(
    "images", [[[[0, 0, 0]]], None, "photo.png", np.zeros((1, 8, 8, 3)), np.zeros((1, 8, 8, 3), np.int64)]
)
def test_other_types_are_refused(session: Session, images: Any) -> None:
    with pytest.raises(TypeError, match=r"images: got .*, expected a NumPy array of uint8 \[N,H,W,3\] or float32"):
        session.invert(images)


@pytest.mark.parametrize("shape", [(8, 8, 3), (1, 8, 8), (1, 8, 8, 4), (1, 3, 8, 8), (1, 0, 8, 3), (1, 8, 0, 3), ()])
def test_pixels_of_another_shape_are_refused(session: Session, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=re.escape(f"images: got uint8 {list(shape)}, expected [N, H, W, 3]")):
        session.invert(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 32, 32, 3), (1, 3, 33, 32), (1, 1, 32, 32), (1, 3, 64, 64)])
def test_prepared_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    session, _, _ = create_session()
    with pytest.raises(ShapeError, match=re.escape(f"images: got float32 {list(shape)}, expected [N, 3, 32, 32]")):
        session.invert(np.zeros(shape, np.float32))


def test_images_of_a_cropped_domain_have_its_shape() -> None:
    session, _, _ = create_session(domain="cars")
    assert session.invert(np.zeros((1, 3, 24, 32), np.float32)).images.shape == (1, 3, 48, 64)
    with pytest.raises(ShapeError, match=r"expected \[N, 3, 24, 32\]"):
        session.invert(np.zeros((1, 3, 32, 32), np.float32))


@pytest.mark.parametrize("images", [np.zeros((0, 8, 8, 3), np.uint8), np.zeros((0, 3, 32, 32), np.float32)])
def test_no_images_are_refused(images: NDArray[Any]) -> None:
    session, _, _ = create_session()
    with pytest.raises(ValueError, match="images: got none, expected at least one"):
        session.invert(images)


def test_float_images_far_outside_their_range_are_refused() -> None:
    session, _, _ = create_session()
    targets = targets_of(session, 2)
    targets[1, 0, 0, 0] = 1.1
    session.invert(targets)
    targets[1, 0, 0, 0] = -200
    with pytest.raises(ValueError, match=r"values up to 200, expected \[-1, 1\]; pass 0..255 as uint8"):
        session.invert(targets)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_images_that_are_not_finite_are_all_named(value: float) -> None:
    session, encoder, _ = create_session()
    targets = targets_of(session, 4)
    targets[1, 2, 3, 4] = targets[3, 0, 0, 0] = value
    with pytest.raises(ValueError, match="NaN or infinity in image 1, 3"):
        session.invert(targets)
    assert not encoder.ran


def test_float_images_of_another_range_are_refused() -> None:
    session, encoder, _ = create_session()
    overshooting = np.full((1, 3, 32, 32), -LARGEST_VALUE, np.float32)
    session.invert(overshooting)
    encoder.ran.clear()
    for value in (255, -2):
        overshooting[0, 1, 2, 3] = value
        with pytest.raises(ValueError, match=rf"values up to {abs(value)}, expected \[-1, 1\]; pass 0\.\.255 as uint8"):
            session.invert(overshooting)
    assert not encoder.ran


@pytest.mark.parametrize("name", ["steps", "max_batch"])
def test_counts_below_one_are_refused(session: Session, name: str) -> None:
    for value in (0, -1, np.int64(0)):
        counts: dict[str, Any] = {name: value}
        with pytest.raises(ValueError, match=f"{name} is {value}, expected at least 1"):
            session.invert(pictures(1), **counts)


@pytest.mark.parametrize("name", ["steps", "max_batch"])
def test_counts_that_are_no_whole_numbers_are_refused(session: Session, name: str) -> None:
    for value, kind in ((5.0, "float"), ("5", "str"), (True, "bool")):
        counts: dict[str, Any] = {name: value}
        with pytest.raises(TypeError, match=f"{name} is a {kind}, expected a whole number"):
            session.invert(pictures(1), **counts)


def test_counts_may_be_numpys() -> None:
    session, encoder, _ = create_session()
    session.invert(targets_of(session, 3), steps=np.int8(100), max_batch=np.int8(2))  # type: ignore[call-overload]
    assert len(encoder.ran) == 2 * 100


def spoil(
    compute: Callable[[Mapping[str, NDArray[Any]]], None], name: str, *, image: int, step: int, value: float
) -> Callable[[Mapping[str, NDArray[Any]]], None]:
    """Return `compute`, with one bad number in one image of its output at a step counted from 1."""
    calls = 0

    def spoiled(buffers: Mapping[str, NDArray[Any]]) -> None:
        nonlocal calls
        compute(buffers)
        calls += 1
        if calls == step:
            buffers[name][image].flat[-1] = value

    return spoiled


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_result_that_is_not_finite_names_step_and_image(value: float) -> None:
    encoder = spoil(encode, "latent_out", image=1, step=2, value=value)
    session, _, _ = create_session(encoder=encoder)
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(VerificationError, match="latent of image 1 is not finite after step 2; .*restyle-deploy verify"),
    ):
        session.invert(targets_of(session, 3), steps=4, every_step=True)


def test_rendered_image_that_is_not_finite_names_step_and_image() -> None:
    session, _, _ = create_session(generator=spoil(generate, "image", image=2, step=3, value=np.nan))
    with pytest.raises(VerificationError, match="the image of image 2 is not finite after step 3"):
        session.invert(targets_of(session, 3), steps=4, every_step=True)


@pytest.mark.parametrize("every_step", [False, True])
def test_images_are_counted_over_split_batches(every_step: bool) -> None:
    generator = spoil(generate, "image", image=1, step=2 * 3, value=np.nan)  # of the second batch, after its last step
    session, _, _ = create_session(generator=generator)
    with pytest.raises(VerificationError, match="the image of image 3 is not finite after step 3"):
        session.invert(targets_of(session, 5), steps=3, every_step=every_step, max_batch=2)


def test_session_goes_on_after_a_result_that_is_not_finite() -> None:
    session, _, _ = create_session(encoder=spoil(encode, "latent_out", image=0, step=1, value=np.nan))
    targets = targets_of(session, 1)
    with pytest.raises(VerificationError, match="image 0 is not finite after step 1"):
        session.invert(targets, steps=1)
    np.testing.assert_allclose(session.invert(targets, steps=1).latents[0, 0, 0], expected_latents(targets, 1)[0, 0])
