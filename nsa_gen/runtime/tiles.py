"""Tile sizes and launch options of a package's kernels, by architecture: which of its tables serves a launch.

Nothing is ever tuned by importing or calling a package.
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

# True where kernels run on the CPU, in Triton's interpreter; Triton decides it when a kernel is defined.
INTERPRETED = knobs.runtime.interpret

Table = dict[str, Constants]
Items = tuple[tuple[str, int], ...]


class _Call(threading.local):
    """The table that serves the operator which runs in a thread; None outside of operators."""

    table: Table | None = None


class Serving:
    """Within the block, kernels that this thread launches have the configurations of a table.

    Every call enters one, which takes a generator of `contextlib` microseconds longer.
    """

    def __init__(self, call: _Call, table: Table) -> None:
        self._call, self.table = call, table

    def __enter__(self) -> None:
        self.before, self._call.table = self._call.table, self.table

    def __exit__(self, *_: object) -> None:
        self._call.table = self.before


class Tiles:
    """The tables of the package in a folder, read from its tiles.json.

    `defaults` is the cost model's choice by architecture and kernel, `schedules` are the entries of the tables that
    choose among kernels; all others are configurations of one kernel.
    """

    def __init__(self, folder: Path) -> None:
        document: dict[str, Any] = json.loads((folder / "tiles.json").read_text(encoding="utf-8"))
        self.defaults = {name: _configs(table) for name, table in document["tiles"].items()}
        self.schedules = tuple(document["schedules"])
        self._space = Space(document["values"], document["rules"])
        self._tuned = Tuned(folder, Identity(**document["identity"]), self._space)
        # Architectures that take the table of another, which has the same matrix instructions and no more shared
        # memory.
        self._shared_tables: dict[str, str] = document["shared_tables"]
        # Shared memory a block may use, in bytes: an architecture that has no table takes that of the largest whose
        # tiles fit.
        self._shared_memory: dict[str, int] = document["shared_memory"]
        # Multiprocessors of the boards that the tables are for: what launches that are only traced are split for.
        self._multiprocessors: dict[str, int] = document["multiprocessors"]
        # Set by `use_target` and `override`. Not by thread: autograd runs the backward on its own.
        self._target: str | None = None
        self._overrides: dict[str, dict[str, int]] = {}
        self._call = _Call()
        self._tables: dict[tuple[torch.device, Bucket], Table] = {}
        self._derived: dict[tuple[Any, torch.device, Bucket], int] = {}
        self._overridden: dict[tuple[str, Items, Items], Constants] = {}
        self._architectures: dict[torch.device, str] = {}
        # Held while a table is made, for which files are read: other threads wait for it.
        self._making = threading.Lock()

    def get(self, kernel: str, device: torch.device, bucket: Bucket | None = None) -> Constants:
        """Tile sizes, num_warps and num_stages that `kernel` is launched with on `device`.

        For calls of the bucket given, else of the operator that runs (`serving`), else the cost model's choice.
        """
        table = self._call.table if bucket is None else self.table_for(device, bucket)
        config = (self.defaults[self._target or self.architecture(device)] if table is None else table)[kernel]
        return self._merged(kernel, config) if kernel in self._overrides else config

    def _merged(self, kernel: str, config: Constants) -> Constants:
        """A configuration with the values of an override in its place, which may not suit those that stay."""
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
        """One value of a schedule for calls of a bucket: a constant to compilers, which do not see where it is kept."""
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
        """What a function makes of the configurations for calls of a bucket, which it asks for by kernel.

        It is kept, by function, until these change, and a constant to compilers.
        """
        bucket = Bucket(tokens, batch, packed, decode)
        if self._target is not None or self._overrides:
            return number(lambda kernel: self.get(kernel, device, bucket))
        key = number, device, bucket
        found = self._derived.get(key)
        if found is None:
            found = self._derived[key] = number(lambda kernel: self.get(kernel, device, bucket))
        return found

    # What torch.compiler.assume_constant_result does, which would import the compiler with every import of a package.
    vars(chosen)["_dynamo_marked_constant"] = vars(derived)["_dynamo_marked_constant"] = True

    def serving(self, device: torch.device, bucket: Bucket) -> Serving:
        """Within the block, kernels that this thread launches on `device` are configured for calls of a bucket."""
        return Serving(self._call, self.table_for(device, bucket))

    def table_for(self, device: torch.device, bucket: Bucket) -> Table:
        """Configurations of every kernel for calls of a bucket. Files are read on the first call for each."""
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
        """The cost model's table with what was tuned in its place."""
        gpu = self.gpu_of(device)
        tuned = {} if gpu is None else _configs(self._tuned.find(gpu, bucket))
        return {**self.defaults[self.architecture(device)], **tuned}

    def forget(self) -> None:
        """Look for tuned configurations again at the next call, as after tuning in this process."""
        self._tables.clear()
        self._derived.clear()
        self._architectures.clear()
        self._tuned.forget()

    def gpu_of(self, device: torch.device) -> Gpu | None:
        """What identifies a device among GPUs; None for what is none."""
        return _gpu_of(device)

    def multiprocessors(self, device: torch.device) -> int:
        """Multiprocessors that launches on a device are split for: those of `use_target` where they are only traced.

        A few for the CPU, where kernels are interpreted.
        """
        if device.type == "meta" and self._target in self._multiprocessors:
            return self._multiprocessors[self._target]
        gpu = self.gpu_of(device)
        return 4 if gpu is None else gpu.multiprocessors

    def target_of(self, device: torch.device) -> str | None:
        """What machine code is made for on a device: its architecture; `use_target`'s where launches are traced."""
        if device.type == "meta":
            return self._target
        gpu = self.gpu_of(device)
        return None if gpu is None else gpu.architecture

    def architecture(self, device: torch.device) -> str:
        """Entry of `defaults` that serves a device, such as "sm_90"; "interpreter" for the CPU."""
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
        """Launch with the table of another architecture within the block, as when compiling ahead of time for it."""
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

        ValueError if they are not legal (see space): now, or by a launch whose other values do not suit them.
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
