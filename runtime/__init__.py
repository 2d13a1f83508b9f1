"""What runs in production: reads a bundle, drives an engine, turns tokens into text. Imports no torch and no onnx."""
