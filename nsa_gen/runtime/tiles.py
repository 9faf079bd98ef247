"""Tile sizes and launch options of a package's kernels, by architecture, and the choice of the table for a launch.

Importing or calling a package never starts tuning.
"""

import contextlib
import functools
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from triton import knobs

from .launch import Constants
from .lookup import Bucket, Gpu, Identity, Tuned
from .space import Space

# True if kernels run on the CPU, in Triton's interpreter. Triton decides this when a kernel is defined.
INTERPRETED = knobs.runtime.interpret

Table = dict[str, Constants]
Items = tuple[tuple[str, int], ...]


class _Call(threading.local):
    """The table of the operator that runs in this thread; None outside of operators."""

    table: Table | None = None


class Serving:
    """Context manager: within the block, kernels that this thread launches use the configurations of a table.

    A class, because every call enters one, and a generator of `contextlib` takes microseconds longer.
    """

    def __init__(self, call: _Call, table: Table) -> None:
        self._call, self.table = call, table

    def __enter__(self) -> None:
        self.before, self._call.table = self._call.table, self.table

    def __exit__(self, *_: object) -> None:
        self._call.table = self.before


class Tiles:
    """The tables of the package in a folder, read from its tiles.json.

    `defaults` is the cost model's choice by architecture and kernel. `schedules` are the names of those entries of the
    tables that choose between kernels; every other entry is the configuration of one kernel.
    """

    def __init__(self, folder: Path) -> None:
        document: dict[str, Any] = json.loads((folder / "tiles.json").read_text(encoding="utf-8"))
        self.defaults = {name: _configs(table) for name, table in document["tiles"].items()}
        self.schedules = tuple(document["schedules"])
        self._space = Space(document["values"], document["rules"])
        self._tuned = Tuned(folder, Identity(**document["identity"]), self._space)
        # Architectures that use the table of another one, which has the same matrix instructions and no more shared
        # memory.
        self._shared_tables: dict[str, str] = document["shared_tables"]
        # Shared memory per block in bytes, by architecture. An architecture without a table uses the table of the one
        # with the most shared memory that still fits.
        self._shared_memory: dict[str, int] = document["shared_memory"]
        # Multiprocessors of the GPUs that the tables are for. Launches that are only traced are split for this number.
        self._multiprocessors: dict[str, int] = document["multiprocessors"]
        # Set by `use_target` and `override`. Process-wide, because autograd runs the backward on its own threads.
        self._target: str | None = None
        self._overrides: dict[str, dict[str, int]] = {}
        self._call = _Call()
        self._tables: dict[tuple[torch.device, Bucket], Table] = {}
        self._derived: dict[tuple[Any, torch.device, Bucket], int] = {}
        self._overridden: dict[tuple[str, Items, Items], Constants] = {}
        self._architectures: dict[torch.device, str] = {}
        # Held while a table is built, which reads files: other threads wait.
        self._making = threading.Lock()

    def get(self, kernel: str, device: torch.device, bucket: Bucket | None = None) -> Constants:
        """Tile sizes, num_warps and num_stages of `kernel` on `device`.

        They are those for `bucket`. If it is None, they are those of the operator that runs (`serving`), and outside of
        operators the cost model's choice.
        """
        table = self._call.table if bucket is None else self.table_for(device, bucket)
        config = (self.defaults[self._target or self.architecture(device)] if table is None else table)[kernel]
        return self._merged(kernel, config) if kernel in self._overrides else config

    def _merged(self, kernel: str, config: Constants) -> Constants:
        """Merge an override into a configuration. ValueError if the merged values are not legal together."""
        values = self._overrides[kernel]
        key = kernel, tuple(config.items()), tuple(values.items())
        if key not in self._overridden:
            merged = Constants(config | values)
            if problem := self._space.problem(kernel, merged):
                raise ValueError(f"override: {problem}")
            self._overridden[key] = merged
        return self._overridden[key]

    def chosen(
        self,
        schedule: str,
        name: str,
        device: torch.device,
        tokens: int,
        batch: int,
        packed: bool,
        decode: bool = False,
    ) -> int:
        """One value of a schedule for calls of a bucket. torch.compile treats it as a constant."""
        return self.get(schedule, device, Bucket(tokens, batch, packed, decode))[name]

    def derived(
        self,
        number: Callable[[Callable[[str], dict[str, int]]], int],
        device: torch.device,
        tokens: int,
        batch: int,
        packed: bool,
        decode: bool = False,
    ) -> int:
        """A number that a function computes from the configurations of a bucket, which it reads by kernel.

        The result is cached by function, device and bucket until `forget`. torch.compile treats it as a constant.
        """
        bucket = Bucket(tokens, batch, packed, decode)
        if self._target is not None or self._overrides:
            return number(lambda kernel: self.get(kernel, device, bucket))
        key = number, device, bucket
        found = self._derived.get(key)
        if found is None:
            found = self._derived[key] = number(lambda kernel: self.get(kernel, device, bucket))
        return found

    # The same as torch.compiler.assume_constant_result, which would import the compiler whenever a package is imported.
    vars(chosen)["_dynamo_marked_constant"] = vars(derived)["_dynamo_marked_constant"] = True

    def serving(self, device: torch.device, bucket: Bucket) -> Serving:
        """Context manager: kernels that this thread launches on `device` are configured for calls of a bucket."""
        return Serving(self._call, self.table_for(device, bucket))

    def table_for(self, device: torch.device, bucket: Bucket) -> Table:
        """Configurations of every kernel for calls of a bucket. The first call for a bucket reads files."""
        if self._target is not None:
            return self.defaults[self._target]
        table = self._tables.get((device, bucket))
        if table is None:
            with self._making:
                table = self._tables.get((device, bucket))
                if table is None:
                    table = self._tables[device, bucket] = self._resolve(device, bucket)
        return table

    def _resolve(self, device: torch.device, bucket: Bucket) -> Table:
        """The cost model's table, with tuned configurations where they exist."""
        gpu = self.gpu_of(device)
        tuned = {} if gpu is None else _configs(self._tuned.find(gpu, bucket))
        return {**self.defaults[self.architecture(device)], **tuned}

    def forget(self) -> None:
        """Search for tuned configurations again at the next call, for example after tuning in this process."""
        self._tables.clear()
        self._derived.clear()
        self._architectures.clear()
        self._tuned.forget()

    def gpu_of(self, device: torch.device) -> Gpu | None:
        """The GPU model of a device; None for the CPU and in the interpreter."""
        return _gpu_of(device)

    def multiprocessors(self, device: torch.device) -> int:
        """Number of multiprocessors for which launches on a device are split.

        It is that of `use_target`'s architecture if launches are only traced, and 4 on the CPU, where kernels are
        interpreted.
        """
        if device.type == "meta" and self._target in self._multiprocessors:
            return self._multiprocessors[self._target]
        gpu = self.gpu_of(device)
        return 4 if gpu is None else gpu.multiprocessors

    def target_of(self, device: torch.device) -> str | None:
        """Architecture for which kernels are compiled on a device; that of `use_target` if launches are only traced."""
        if device.type == "meta":
            return self._target
        gpu = self.gpu_of(device)
        return None if gpu is None else gpu.architecture

    def architecture(self, device: torch.device) -> str:
        """Key of `defaults` for a device, such as "sm_90"; "interpreter" for the CPU."""
        found = self._architectures.get(device)
        if found is None:
            found = self._architectures[device] = self._architecture_for(device)
        return found

    def _architecture_for(self, device: torch.device) -> str:
        gpu = self.gpu_of(device)
        if gpu is None:
            return "interpreter"
        target = self._shared_tables.get(gpu.architecture, gpu.architecture)
        if target in self.defaults:
            return target
        properties = torch.cuda.get_device_properties(device)
        limit = "shared_memory_per_block" if torch.version.hip else "shared_memory_per_block_optin"
        sizes, available = self._shared_memory, getattr(properties, limit)
        fitting = [target for target, size in sizes.items() if size <= available]
        return max(fitting, key=sizes.__getitem__) if fitting else min(sizes, key=sizes.__getitem__)

    @contextlib.contextmanager
    def use_target(self, target: str) -> Iterator[None]:
        """Use the table of another architecture within the block, for example to compile ahead of time for it."""
        table = self._shared_tables.get(target, target)
        if table not in self.defaults:
            known = ", ".join([*self.defaults, *self._shared_tables])
            raise ValueError(f"target: expected one of {known}, got {target!r}")
        before, self._target = self._target, table
        try:
            yield
        finally:
            self._target = before

    @contextlib.contextmanager
    def override(self, kernel: str, **values: int) -> Iterator[None]:
        """Launch `kernel` with other tile sizes within the block: `with override("window_forward", KEY_BLOCK=64): ...`.

        Raises ValueError if the values are not legal (see space): here, or in a launch if they do not fit the other
        values.
        """
        if problem := self._space.problem(kernel, values, some=True):
            raise ValueError(problem)
        before = self._overrides
        self._overrides = {**before, kernel: {**before.get(kernel, {}), **values}}
        try:
            yield
        finally:
            self._overrides = before


def _configs(table: Mapping[str, Mapping[str, int]]) -> Table:
    return {kernel: Constants(values) for kernel, values in table.items()}


@functools.cache
def _gpu_of(device: torch.device) -> Gpu | None:
    if INTERPRETED or device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    name = f"sm_{properties.major}{properties.minor}"
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
    return Gpu(properties.name, properties.multi_processor_count, name)
