"""Work that one branch's kernels can do for another branch."""

from __future__ import annotations

from nsa_gen.spec import Spec


def local_in_window(spec: Spec) -> bool:
    """Whether the window's kernels can attend to the selected branch's local blocks.

    Both branches must read the same keys, and the local blocks must lie within the window. It is not possible if the
    caller gives the selection, because local blocks may then be missing. It is not needed for joint branches: there the
    selected branch leaves all of the window's keys to the window.
    """
    selection, window = spec.selection, spec.window
    if selection is None or window is None or selection.indices != "computed" or spec.kv != "shared":
        return False
    if spec.combine.joint:
        return False
    return 0 < selection.local * selection.block <= window.size
