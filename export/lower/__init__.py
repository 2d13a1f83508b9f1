"""Lowering: from the universal graph to what one target runs best. One file a target."""
