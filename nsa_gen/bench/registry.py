"""The contenders that nsa_gen knows besides its own operator, by the names the command line gives them."""

from __future__ import annotations

from collections.abc import Sequence

from nsa_gen.bench.contenders import Contender
from nsa_gen.bench.dense import FlashAttention4, FlexAttention, Sdpa
from nsa_gen.bench.peers import PEERS

CUDNN = Sdpa("cudnn", "CUDNN_ATTENTION")
FA2 = Sdpa("fa2", "FLASH_ATTENTION")
EFFICIENT = Sdpa("efficient", "EFFICIENT_ATTENTION")

CONTENDERS: dict[str, Contender] = {
    contender.name: contender for contender in (CUDNN, FA2, EFFICIENT, FlashAttention4(), FlexAttention(), *PEERS)
}

DEFAULT_NAMES = ("cudnn", "fa2", "fa4", *(peer.name for peer in PEERS))
"""What an operator is timed against where nothing else is asked for; those that are not installed are left out."""


def choose(names: Sequence[str]) -> list[Contender]:
    """The contenders of these names, in the order of the registry; "dense" and "peers" stand for several.

    Raises:
        ValueError: a name is not known.
    """
    groups = {"dense": ("cudnn", "fa2", "fa4"), "peers": tuple(peer.name for peer in PEERS)}
    wanted = {one for name in names for one in groups.get(name, (name,))}
    if unknown := sorted(wanted - CONTENDERS.keys()):
        known = ", ".join((*groups, *CONTENDERS))
        raise ValueError(f"contenders: expected some of {known}, got {', '.join(unknown):.60}")
    return [contender for name, contender in CONTENDERS.items() if name in wanted]
