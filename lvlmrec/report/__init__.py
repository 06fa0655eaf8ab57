"""Reports: results of evaluations side by side."""
