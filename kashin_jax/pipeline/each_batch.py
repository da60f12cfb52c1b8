"""One program run for batch after batch, on every local device another batch."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

__all__ = ["Call", "each_batch"]


class Call(NamedTuple):
    """A compiled program and all of its arguments but those of a batch.

    Attributes:
      function: From `jax.jit`.
      static: Its first arguments, which it knows when it is compiled.
      shared: Those after them, arrays that all batches have in common.
    """

    function: Callable[..., Any]
    static: tuple[Any, ...]
    shared: tuple[Any, ...]

    def __call__(self, *own: Any) -> Any:
        """What it gives for one batch, on one device."""
        return self.function(*self.static, *self.shared, *own)


def each_batch(call: Call, batches: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """What a program gives for every batch, in their order.

    Where there are several local devices, each of them has a batch of its own, and
    nothing is summed across them: it runs the program that a single device would run,
    and what comes back does not depend on how many there are. Where the number of
    batches is no multiple of theirs, some are idle in the end.

    Args:
      call: The program.
      batches: Arrays of every batch, all of the same shapes.
    """
    devices = jax.local_devices()
    if len(devices) == 1:
        yield from (call(*own) for own in batches)
        return
    mesh = Mesh(np.array(devices), ("batch",))
    shared = jax.device_put(call.shared, NamedSharding(mesh, PartitionSpec()))
    rest = iter(batches)
    while some := list(islice(rest, len(devices))):
        # Devices that are left over do the last batch once more.
        filled = some + some[-1:] * (len(devices) - len(some))
        own = jax.tree.map(partial(_on_each, mesh), *filled)
        found = _all_at_once(call.function, call.static, mesh, shared, own)
        for index in range(len(some)):
            yield jax.tree.map(partial(_of_device, devices[index]), found)


def _on_each(mesh: Mesh, *arrays: Any) -> jax.Array:
    """Arrays of one shape, stacked, each on a device of its own."""
    parts = [
        jax.device_put(np.asarray(array)[None], device)
        for array, device in zip(arrays, mesh.devices.flat, strict=True)
    ]
    shape = (len(parts), *parts[0].shape[1:])
    sharding = NamedSharding(mesh, PartitionSpec("batch"))
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _of_device(device: jax.Device, array: jax.Array) -> np.ndarray:
    (part,) = (s.data for s in array.addressable_shards if s.device == device)
    return np.asarray(part)[0]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _all_at_once(
    function: Callable[..., Any], static: tuple[Any, ...], mesh: Mesh, *arrays: Any
) -> Any:
    def of_one(shared: tuple[Any, ...], own: tuple[Any, ...]) -> Any:
        first = jax.tree.map(lambda array: array[0], own)
        return jax.tree.map(lambda a: a[None], function(*static, *shared, *first))

    one = PartitionSpec("batch")
    # Nothing goes from one device to another, which need not be proved.
    return jax.shard_map(
        of_one, mesh=mesh, in_specs=(PartitionSpec(), one), out_specs=one,
        check_vma=False,
    )(*arrays)  # fmt: skip
