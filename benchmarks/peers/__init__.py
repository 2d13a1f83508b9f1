"""The runtimes that can take part, one file each; the first is the one the others are compared with."""

from ..peer import Peer
from . import ctranslate2, genai, llama_cpp, openvino, transformers, zonda

PEERS: dict[str, Peer] = {
    module.PEER.name: module.PEER for module in (zonda, llama_cpp, ctranslate2, openvino, genai, transformers)
}
