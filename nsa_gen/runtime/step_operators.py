"""Registration of a package's operators: the whole operator, and each step on its own.

The package provides names, sizes and launches. The allocation, padding and returns around a launch are the same in
every package.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .registration import Library, Operator, Output, name_of, sequence_places
from .sequences import OutputGradient, Sequences

Tensors = tuple[torch.Tensor, ...]
OUTPUT, ROW_STATISTIC = "B Tq Hq Dv", "B Tq Hq"


class StepOperators:
    """Registers a package's operators.

    Args:
        library: the library in which they are registered.
        sizes: sizes of the dims of outputs that are the same for all calls: Hq, Hkv, Dk, Dv, S (scopes: block
            selections per token) and n (blocks per selection).
        rows: dims that depend on the call, by name: functions of its first tensor and its `Sequences`.
        pad_outputs, pad_gradients: functions that fill the rows that pad a packed batch, in the tensors given by name.
        delta: computes delta, the row sums of do * o, for the backward of attention; None without a backward.
    """

    def __init__(
        self,
        library: Library,
        sizes: Mapping[str, int],
        rows: Mapping[str, Callable[[torch.Tensor, Sequences], int]],
        pad_outputs: Callable[..., None],
        pad_gradients: Callable[..., None] | None = None,
        delta: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self._library, self._sizes, self._rows = library, sizes, rows
        self._pad_outputs, self._pad_gradients, self._delta = pad_outputs, pad_gradients, delta

    def register(self, operator: Operator, forward: Callable, backward: Callable | None = None) -> Operator:
        """Register an operator, with outputs as declared; `backward` gets a list of its arguments and empties it."""
        self._library.register(operator, forward, self._fake_of(operator), backward)
        return operator

    def _fake_of(self, operator: Operator) -> Callable:
        keys, packed = sequence_places(operator.inputs)

        def fake(*arguments: Any) -> Any:
            """Allocate the outputs, uninitialized."""
            first, rows = arguments[0], arguments[keys]
            tokens = rows.shape[1] if isinstance(rows, torch.Tensor) else rows
            cu_seqlens = None if packed is None else arguments[packed]
            sequences = Sequences(first.shape[0], first.shape[1], tokens, cu_seqlens)
            known = {"B": first.shape[0], "Tq": first.shape[1], **self._sizes}

            def size(dim: str) -> int:
                if dim in self._rows:
                    return self._rows[dim](first, sequences)
                return known[dim] if dim in known else int(dim)

            outputs = tuple(each.allocate(first, size) for each in operator.returns)
            return outputs[0] if len(outputs) == 1 else outputs

        return fake

    def attend(
        self,
        name: str,
        inputs: tuple[str, ...],
        forward: Callable[..., Tensors],
        backward: Callable[..., None] | None = None,
        *,
        pads: tuple[str, str],
        sink: str = "",
        index: tuple[str, ...] = (),
        pads_gradients: tuple[str, ...] = (),
        adds: bool = False,
        has_gaps: bool = False,
    ) -> Operator:
        """Register the attention of one branch, without gates: o, lse, and other outputs for the backward.

        Args:
            name: name of the operator.
            inputs: q, keys, values, then the arguments of the launches before and after `cu_seqlens`. "tokens:int" is
                the number of raw keys from which compressed ones were computed; launches find it in their `Sequences`.
            forward, backward: the launches. `backward` gets the gradients to write to, and, in one tuple, the selection
                and the outputs `index`.
            sink: name of the input after the values that is the sink, (Hq,) float32; "" without a sink.
            pads: argument names of o and lse in `pad_outputs`.
            index: names of further int32 outputs of the forward, for the backward.
            pads_gradients: argument names of the gradients of keys and values in `pad_gradients`.
            adds: whether the backward adds to float32 gradients of keys and values, which must start at zero.
            has_gaps: whether, if packed, some rows of keys and values belong to no sequence: their gradient is zero.
        """
        _q, k, v, *others = inputs
        names = [name_of(each) for each in others]
        packed, count = names.index("cu_seqlens"), len(names)
        counted = "tokens" in names

        def unpack(q: torch.Tensor, k: torch.Tensor, given: tuple) -> tuple[Sequences, tuple, tuple]:
            """The sequences of a call, and the arguments of launches before and after them."""
            tokens = given[0] if counted else k.shape[1]
            sequences = Sequences(q.shape[0], q.shape[1], tokens, given[packed])
            return sequences, given[counted:packed], given[packed + 1 : count]

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *given: Any) -> Tensors:
            sequences, before, behind = unpack(q, k, given)
            found = forward(q, k, v, *before, sequences, *behind)[: 2 + len(index)]
            if sequences.packed:
                self._pad_outputs(sequences, **dict(zip(pads, found, strict=False)))
            return found

        def run_backward(do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *given: Any) -> Tensors:
            assert backward is not None and self._delta is not None and self._pad_gradients is not None
            sequences, before, behind = unpack(q, k, given)
            o, lse, *found = given[count:]
            do = do.contiguous()
            dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            allocate = torch.zeros if adds or (has_gaps and sequences.packed) else torch.empty
            dk, dv = (allocate(x.shape, dtype=torch.float32 if adds else x.dtype, device=x.device) for x in (k, v))
            delta = self._delta(do, o)
            learned: dict[str, torch.Tensor] = {}
            if sink:
                learned = {"sink": before[0], "dsink": torch.empty_like(before[0])}
                before = before[1:]
            lists = ((*before, *found),) if index else before
            gradient = OutputGradient(do, lse, delta, None)
            backward(q, k, v, *lists, gradient, dq, dk, dv, sequences, *behind, **learned)
            if sequences.packed:
                self._pad_gradients(sequences, dq=dq, **dict(zip(pads_gradients, (dk, dv), strict=False)))
            gradients = dq, dk.to(k.dtype), dv.to(v.dtype)
            return (*gradients, learned["dsink"]) if sink else gradients

        saved = backward is not None
        outputs = (
            Output("o", OUTPUT, saved=saved),
            Output("lse", ROW_STATISTIC, torch.float32, saved=saved),
            *(Output(each, "slots", torch.int32, saved=saved) for each in index),
        )
        operator = Operator(name, inputs, outputs, ("q", k, v, *([sink] if sink else [])) if saved else ())
        return self.register(operator, run, (lambda given: run_backward(*given)) if saved else None)

    def select(self, name: str, inputs: tuple[str, ...], launch: Callable[..., Tensors]) -> Operator:
        """Register the selection of blocks, which returns `indices` and `counts` and is not differentiable.

        The last `inputs` are the raw keys or their number, "tokens:int", and then "cu_seqlens?". The launch takes the
        tensors before "cu_seqlens?".
        """

        def run(q: torch.Tensor, *given: Any) -> Tensors:
            *others, tokens, cu_seqlens = given
            if isinstance(tokens, torch.Tensor):
                others, tokens = [*others, tokens], tokens.shape[1]
            sequences = Sequences(q.shape[0], q.shape[1], tokens, cu_seqlens)
            indices, counts = launch(q, *others, sequences)
            if sequences.packed:
                self._pad_outputs(sequences, indices=indices, counts=counts)
            return indices, counts

        lists = Output("indices", "B Tq S n", torch.int32), Output("counts", "B Tq S", torch.int32)
        return self.register(Operator(name, inputs, lists), run)

    def compress(
        self,
        parameters: Callable[..., tuple[torch.Tensor, ...]] | None,
        fields: tuple[str, ...],
        outputs: tuple[Output, ...],
        forward: Callable[..., tuple[torch.Tensor, torch.Tensor, Tensors]],
        backward: Callable[..., Tensors | None] | None = None,
        pads_gradients: tuple[str, str] = ("dk", "dv"),
    ) -> Operator:
        """Register compression, which returns k_cmp, v_cmp and the tensors that phi saves.

        Args:
            parameters: the type of phi's parameters, None if it has none.
            fields: the fields of that type, in order.
            outputs: k_cmp, v_cmp and the saved tensors.
            forward, backward: the launches; `backward` returns the gradients of phi's parameters.
            pads_gradients: argument names of the gradients of k and v in `pad_gradients`.
        """

        def made_of(given: tuple) -> tuple[Tensors | None, Sequences]:
            tensors = None if parameters is None else parameters(*given[2 : 2 + len(fields)])
            k, cu_seqlens = given[0], given[2 + len(fields)]
            return tensors, Sequences(k.shape[0], k.shape[1], k.shape[1], cu_seqlens)

        def run(*given: Any) -> Tensors:
            tensors, sequences = made_of(given)
            k_cmp, v_cmp, saved = forward(*given[:2], tensors, sequences)
            return (k_cmp, v_cmp, *saved)

        def run_backward(dk_cmp: torch.Tensor, dv_cmp: torch.Tensor, *given: Any) -> Tensors:
            assert backward is not None and self._pad_gradients is not None
            (k, v), saved = given[:2], given[3 + len(fields) :]
            tensors, sequences = made_of(given)
            dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
            incoming = dk_cmp.float().contiguous(), dv_cmp.float().contiguous()
            learned = backward(k, v, tensors, saved, *incoming, dk, dv, sequences)
            if sequences.packed:
                self._pad_gradients(sequences, **dict(zip(pads_gradients, (dk, dv), strict=True)))
            return (dk, dv, *(learned or ()))

        inputs = ("k", "v", *fields, "cu_seqlens?")
        gradients = () if backward is None else inputs[:-1]
        operator = Operator("compress", inputs, outputs, gradients, differentiable_outputs=2 if gradients else 1)
        return self.register(operator, run, (lambda given: run_backward(*given)) if gradients else None)

    def compress_keys(self, output: Output, launch: Callable[[torch.Tensor, Sequences], torch.Tensor]) -> Operator:
        """Register the compression of keys that are used only to select blocks; `output` is not differentiable."""

        def run(k: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
            return launch(k, Sequences(k.shape[0], k.shape[1], k.shape[1], cu_seqlens))

        return self.register(Operator("compress", ("k", "cu_seqlens?"), (output,)), run)

    def combine(
        self, inputs: tuple[str, ...], gate: str, forward: Callable, backward: Callable[..., tuple] | None = None
    ) -> Operator:
        """Register the combination of the branches' outputs. Gates follow the outputs unless `gate` is "none".

        `gate` is "sigmoid" if gates are logits. `backward` returns delta and the gradient of gates.
        """

        def run_backward(do: torch.Tensor, *given: torch.Tensor) -> Tensors:
            do = do.contiguous()
            if gate == "none":
                return tuple(do.clone() for _ in given)
            assert backward is not None
            *outputs, gates = given
            _, dgates = backward(do, *given)
            values = torch.sigmoid(gates.float()) if gate == "sigmoid" else gates.float()
            return (*((do * values[..., n, None]).to(o.dtype) for n, o in enumerate(outputs)), dgates)

        differentiable = backward is not None
        operator = Operator("combine", inputs, (Output("o", OUTPUT),), inputs if differentiable else ())
        return self.register(operator, forward, (lambda given: run_backward(*given)) if differentiable else None)
