"""The vocabulary and the plan: recipes, cells, rows, grids, plans and the store.  No torch, no scheduler."""
