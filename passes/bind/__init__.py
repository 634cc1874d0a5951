"""From names in the recipe to nodes of the graph."""
