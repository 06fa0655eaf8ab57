"""Side-by-side scripts, one per claim, and their dated results."""
