"""What depends on the timestep or the prompt alone: tables, and the prologue."""
