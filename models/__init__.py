"""Model definitions in torch, written with markers: the reference that every compiled engine is held to."""
