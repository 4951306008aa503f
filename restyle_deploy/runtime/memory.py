"""All memory of a session on its device: the loop's state and the slots of its calls, sized at opening."""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

from restyle_deploy.bundle import Bundle
from restyle_deploy.engines import GraphRecord
from restyle_deploy.runtime.arena import AVERAGE_LATENT, State, aligned, place_arrays, state_shapes
from restyle_deploy.runtime.base import Device
from restyle_deploy.runtime.slots import ARENA_SLOTS, Slot, Slots

_FLOAT_BYTES = 4


class SessionMemory:
    """One block of the device and one of pinned host memory, and what lies in them. Owned by a session.

    On the host there is no slot in them: nothing is staged, and results are written where the caller gets them.

    Attributes:
        shapes: of one image's `image`, `latent` and `current`.
        state: what loops work on.
        slots: what calls lease.
    """

    def __init__(self, bundle: Bundle, graphs: Mapping[str, GraphRecord], device: Device, *, max_batch: int) -> None:
        """Allocate, and put the average into the state.

        Args:
            bundle, graphs: what runs.
            device: owned from now on, but not closed after an error.
            max_batch: images of one run.
        Raises:
            DeviceError: there is not so much memory.
        """
        shapes = state_shapes(bundle, graphs)
        self.shapes = {"image": shapes["image"], "latent": shapes[AVERAGE_LATENT], "current": shapes["current"]}
        self._input_bytes = sum(aligned(max_batch * nbytes) for nbytes in self._input_sizes(shapes["target"]))
        with ExitStack() as memory:
            places, state_bytes = place_arrays(shapes, max_batch)
            slot_bytes = Slot.nbytes(self.shapes, rows=max_batch, input_bytes=self._input_bytes)
            slots = 0 if device.is_host else ARENA_SLOTS
            block = device.allocate(state_bytes + slots * slot_bytes)
            memory.callback(block.close)
            pinned = device.allocate_host(slots * slot_bytes)
            memory.callback(pinned.close)
            self.state = State(device, block, places, bundle)
            given = [(block, state_bytes + index * slot_bytes, pinned, index * slot_bytes) for index in range(slots)]
            # None of these refers to this object: the device goes with its last user, and its stream to the next one.
            create = partial(Slot, device, shapes=self.shapes, input_bytes=self._input_bytes)
            first = [create(rows=max_batch, given=one) for one in given]
            kept = memory.pop_all()

            def release() -> None:
                try:
                    kept.close()
                finally:
                    device.close()

            # Results that callers hold on the device keep the memory, and the device with it.
            self.slots = Slots(first, lambda rows: create(rows=rows), release=release)

    def close(self) -> None:
        """Release all, at once or when the last lease ends; nothing may be in flight. Safe to call twice."""
        self.state.close()
        self.slots.close()

    def _input_sizes(self, target: tuple[int, ...]) -> tuple[int, ...]:
        """Return the bytes of an image, prepared or a photo as large as what is rendered, and of where it starts."""
        image = max(math.prod(self.shapes["image"]), _FLOAT_BYTES * math.prod(target))
        return image, *(_FLOAT_BYTES * math.prod(self.shapes[name]) for name in ("latent", "current"))
