"""The last touches: names, shared constants, half precision."""
