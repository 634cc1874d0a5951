"""Small denoisers drawn at random: the pieces, and how they are put together."""
