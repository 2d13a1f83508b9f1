"""The runtimes that can take part, one file each; the first is the one the others are compared with."""

from ..peer import Peer
from . import genai, transformers, zonda

PEERS: dict[str, Peer] = {module.PEER.name: module.PEER for module in (zonda, genai, transformers)}
