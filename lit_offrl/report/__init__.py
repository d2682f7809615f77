"""From run folders to tables, curves and intervals. Reads files only: no torch, no environments."""
