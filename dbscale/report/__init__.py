"""Where rows become answers: one table, fits per arm, the boundary, and a page to read.  No torch."""
