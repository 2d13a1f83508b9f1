"""From a torch model to an engine bundle: universal ONNX, lowering for a target, proof, and the bundle's files."""
