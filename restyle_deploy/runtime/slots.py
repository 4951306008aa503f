"""Memory of one call that the next call must not touch yet: pinned staging, and results on the device."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.device_array import Array
from restyle_deploy.runtime.arena import Arrays, aligned, part_of, place_arrays
from restyle_deploy.runtime.base import Block, Device, Event

# Slots of the arena: one being filled while the other is emptied.
ARENA_SLOTS = 2
# Slots kept for the next calls once they are free: as many as were in use at once since the last so many leases, or the
# ones before those; these at least, and these at most.
LEASES_REMEMBERED = 256
LEAST_SLOTS, MOST_SLOTS = 4, 64

RESULTS = ("image", "latent", "current")

GivenMemory = tuple[Block, int, Block, int]
"""A block of the device and where in it a slot begins, and a pinned one likewise."""


class SlotMemory:
    """Memory somewhere in a given block, or a block of its own that is allocated when it is first needed."""

    def __init__(self, allocate: Callable[[int], Block], nbytes: int, given: tuple[Block, int] | None) -> None:
        """Take `nbytes` of a given block from an offset on; for None, of one that `allocate` makes."""
        self._allocate = allocate
        self._first = nbytes, given
        self._nbytes, self._given = self._first
        self._own: Block | None = None

    def block(self) -> tuple[Block, int]:
        """Return the block, and where in it the memory begins."""
        if self._given is not None:
            return self._given
        if self._own is None:
            self._own = self._allocate(self._nbytes)
        return self._own, 0

    def reserve(self, nbytes: int = 0) -> None:
        """Be there, and have at least so many bytes, in another block if need be; what was there is lost then.

        Raises:
            DeviceError: there is not so much memory; it is as it was at first.
        """
        if nbytes > self._nbytes:
            self.close()
            self._nbytes, self._given = nbytes, None
        try:
            self.block()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give back a block of its own, and be as at first; safe to call twice."""
        own, self._own = self._own, None
        self._nbytes, self._given = self._first
        if own is not None:
            own.close()


class Slot:
    """Staging for the images and the start of one run, and results of as many images, pinned or on the device.

    On the host nothing is staged: images are read where they are, and results are written where the caller gets them.

    Attributes:
        rows: images of all steps that are kept, as which results fit.
        event: reached when what was enqueued last has ended; None before that.
        views: the arrays of the last results that stayed here, with what they were for, to be used again.
    """

    def __init__(
        self,
        device: Device,
        *,
        rows: int,
        shapes: Mapping[str, tuple[int, ...]],
        input_bytes: int,
        given: GivenMemory | None = None,
    ) -> None:
        """Place the arrays.

        Args:
            device: where they lie.
            rows: images that results are to be held of.
            shapes: of one image's `image`, `latent` and `current`.
            input_bytes: of the images of one run that are staged; more of them take memory of their own.
            given: where a slot of the arena lies; others allocate memory when they first need it.
        """
        self.rows = rows
        self.event: Event | None = None
        self.views: tuple[object, Any] | None = None
        self._device = device
        self._places, result_bytes = place_arrays({name: shapes[name] for name in RESULTS}, rows)
        inputs = results = pinned_inputs = pinned_results = None
        if given is not None:
            block, begin, pinned, pinned_begin = given
            inputs, results = (block, begin), (block, begin + aligned(input_bytes))
            pinned_inputs, pinned_results = (pinned, pinned_begin), (pinned, pinned_begin + aligned(input_bytes))
        self._staging = SlotMemory(device.allocate_host, input_bytes, pinned_inputs)
        self._inputs = SlotMemory(device.allocate, input_bytes, inputs)
        self._results = SlotMemory(device.allocate, result_bytes, results)
        self._arrivals = SlotMemory(device.allocate_host, result_bytes, pinned_results)
        self._deliveries: list[tuple[NDArray[Any], NDArray[Any]]] = []
        self._is_staged = False  # whether work up to `event` may read the staging

    @staticmethod
    def nbytes(shapes: Mapping[str, tuple[int, ...]], *, rows: int, input_bytes: int) -> int:
        """Return the bytes of the device, and as many pinned ones, that a slot of the arena takes."""
        return aligned(input_bytes) + place_arrays({name: shapes[name] for name in RESULTS}, rows)[1]

    def reserve(self, nbytes: Iterable[int], *, upload_bytes: int) -> None:
        """Have memory for what goes to the device; before `stage`, while no other thread calls the device.

        Args:
            nbytes: of the arrays that are staged.
            upload_bytes: of those among them that `upload` takes.
        Raises:
            DeviceError: there is not so much memory.
        """
        if self._device.is_host:
            return
        self._staging.reserve(sum(map(aligned, nbytes)))
        if upload_bytes:
            self._inputs.reserve(upload_bytes)

    def reserve_downloads(self, *, is_pixels: bool) -> None:
        """Have memory for results that go to the host; pixels are made on the device. See `reserve`."""
        if self._device.is_host:
            return
        self._arrivals.reserve()
        if is_pixels:
            self._results.reserve()

    def stage(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Copy arrays into pinned memory, once no work reads it any more; on the host return them as they are.

        Other threads may call the device meanwhile.
        """
        if self._device.is_host or not arrays:
            return dict(arrays)
        if self.event is not None and self._is_staged:
            self.event.wait()
        self._is_staged = True
        block, offset = self._staging.block()
        staged = {}
        for name, array in arrays.items():
            staged[name] = cast(NDArray[Any], self._device.array(block, offset, array.shape, array.dtype.name))
            np.copyto(staged[name], array)
            offset += aligned(array.nbytes)
        return staged

    def upload(self, staged: NDArray[Any]) -> Array:
        """Enqueue the copy of staged images to the device, after `reserve`; on the host return them as they are."""
        if self._device.is_host:
            return staged
        block, offset = self._inputs.block()
        uploaded = self._device.array(block, offset, staged.shape, staged.dtype.name)
        self._device.copy(uploaded, staged)
        return uploaded

    def download_pixels(self, row: int, source: Array, destination: NDArray[np.uint8]) -> None:
        """Enqueue images as pixels, and their copy to the host; see `download`.

        Args:
            row: see `download`.
            source: float32 [N, 3, R, R'] on the device.
            destination: uint8 [N, R, R', 3].
        """
        if self._device.is_host:
            self._device.pixels_from_images(source, destination)
            return
        rows = self.result("image", (row + len(source),), destination.shape[1:], "uint8")
        pixels = part_of(rows, row, row + len(source))
        self._device.pixels_from_images(source, pixels)
        self.download("image", row, pixels, destination)

    def result(self, name: str, leading: tuple[int, ...], shape: tuple[int, ...], dtype: str) -> Array:
        """Return a result's array on the device: [*leading, *shape]; a view."""
        return self._array(self._results, name, leading, shape, dtype)

    def download(self, name: str, row: int, source: Array, destination: NDArray[Any]) -> None:
        """Enqueue the copy of a part of a result to the host, where `deliver` copies it on to `destination`.

        Args:
            name: one of `RESULTS`.
            row: of the slot's array, where the part goes.
            source: on the device.
            destination: the caller's, contiguous and of the same shape and dtype.
        """
        if self._device.is_host:
            self._device.copy(destination, source)
            return
        staged = self._array(self._arrivals, name, (row + len(source),), source.shape[1:], str(source.dtype))
        part = cast(NDArray[Any], staged)[row:]
        self._device.copy(part, source)
        self._deliveries.append((destination, part))

    def deliver(self) -> None:
        """Copy what has arrived on the host to where the caller gets it; `event` has been waited for."""
        for destination, staged in self._deliveries:
            np.copyto(destination, staged)
        self._deliveries.clear()
        self.event, self._is_staged = None, False  # there is nothing that the next call would have to wait for

    def forget_deliveries(self) -> None:
        """Leave what may arrive undelivered, after an error, and let go of where it would have gone."""
        self._deliveries.clear()

    def close(self) -> None:
        """Give back what is not of the arena; safe to call twice."""
        with ExitStack() as closing:
            for memory in (self._staging, self._inputs, self._results, self._arrivals):
                closing.callback(memory.close)

    def _array(
        self, memory: SlotMemory, name: str, leading: tuple[int, ...], shape: tuple[int, ...], dtype: str
    ) -> Array:
        block, begin = memory.block()
        arrays = Arrays(self._device, block, self._places, begin=begin)
        return arrays.shaped(name, leading, dtype, shape)


class Lease:
    """A slot for as long as this, or an array that has it as its owner, is alive."""

    def __init__(self, slot: Slot, give_back: Callable[[Slot], None]) -> None:
        self.slot = slot
        self._give_back: Callable[[Slot], None] | None = give_back

    def end(self) -> None:
        """Give the slot back now; safe to call twice. No array of it may be read any more."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back(self.slot)

    def __del__(self) -> None:
        self.end()


class Slots:
    """The slots of a session. One thread at a time leases; slots come back from any, by garbage collection too."""

    def __init__(
        self,
        first: list[Slot],
        create: Callable[[int], Slot],
        *,
        release: Callable[[], None],
    ) -> None:
        """Start with slots of the arena.

        Args:
            first: the arena's.
            create: makes a further one for so many rows.
            release: called once all slots are back after `close`, or again; frees what they lie in.
        """
        self._create, self._release = create, release
        self._arena = first
        self._free = list(first)
        self._returned: deque[Slot] = deque()  # garbage collection may interrupt whatever else touches the free ones
        self._out: dict[int, Slot] = {}
        self._leases, self._most_out, self._most_out_before = 0, 0, 0
        self._is_closed = False
        self._closing = threading.RLock()

    def lease(self, rows: int) -> Lease:
        """Return the smallest free slot that holds results of so many rows, or a new one."""
        self._take_returned()
        self._close_spares()
        fitting = [slot for slot in reversed(self._free) if slot.rows >= rows]
        if fitting:
            slot = min(fitting, key=lambda slot: slot.rows)  # the one last used, which may have grown
            self._free.remove(slot)
        else:
            slot = self._create(rows)
        self._out[id(slot)] = slot
        self._note_use()
        return Lease(slot, self._give_back)

    def close_free(self) -> None:
        """Give back what free slots have allocated; the arena's serve later calls as at first, the others are gone."""
        self._take_returned()
        free, self._free = self._free, [slot for slot in self._free if slot in self._arena]
        with ExitStack() as closing:
            for slot in free:
                closing.callback(slot.close)

    def close(self) -> None:
        """Close the free slots, and the others when they come back; then release. Safe to call twice."""
        self._is_closed = True
        self._returned.extend(self._free)
        self._free.clear()
        self._finish()

    def _take_returned(self) -> None:
        while self._returned:
            self._free.append(self._returned.popleft())

    def _give_back(self, slot: Slot) -> None:
        slot.forget_deliveries()
        self._out.pop(id(slot), None)  # before it can be leased again, which another thread may do at once
        self._returned.append(slot)
        if self._is_closed:
            self._finish()

    def _finish(self) -> None:
        with self._closing, ExitStack() as closing:  # the last slots may come back in several threads
            if not self._out:
                closing.callback(self._release)
            while self._returned:
                closing.callback(self._returned.popleft().close)

    def _note_use(self) -> None:
        """Note how many slots are in use at once; what was so long ago is forgotten."""
        self._leases += 1
        if self._leases % LEASES_REMEMBERED == 0:
            self._most_out_before, self._most_out = self._most_out, 0
        self._most_out = max(self._most_out, len(self._out))

    def _close_spares(self) -> None:
        """Close those further slots that have been free for longest, beyond what was in use at once lately."""
        kept = min(max(self._most_out, self._most_out_before, LEAST_SLOTS), MOST_SLOTS)
        spares = [slot for slot in self._free if slot not in self._arena]
        surplus = len(self._free) + len(self._out) - kept
        for slot in spares[: max(0, surplus)]:
            self._free.remove(slot)
            slot.close()
