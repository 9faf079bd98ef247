"""What one branch's kernels can do for another."""

from __future__ import annotations

from nsa_gen.spec import Spec


def local_in_window(spec: Spec) -> bool:
    """Whether the window's kernels can do the selected branch's local blocks: the same keys, all in the window.

    Not where the caller says what is selected: local blocks may then be missing. Nor where both are under one softmax,
    where the selected branch leaves all of the window's keys to it.
    """
    selection, window = spec.selection, spec.window
    if selection is None or window is None or selection.indices != "computed" or spec.kv != "shared":
        return False
    if spec.combine.joint:
        return False
    return 0 < selection.local * selection.block <= window.size
