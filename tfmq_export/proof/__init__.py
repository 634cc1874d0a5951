"""Whether a bundle computes what its recipe says, and draws what the model draws."""
