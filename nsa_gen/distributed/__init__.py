"""Generated operators on sequences that are sharded over several processes, with torch.distributed."""

from nsa_gen.distributed.attention import ContextParallel
from nsa_gen.distributed.sharding import Shards

__all__ = ["ContextParallel", "Shards"]
